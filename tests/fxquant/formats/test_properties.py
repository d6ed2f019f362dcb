"""What holds for every scalar format. A new format is one line of CASES."""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu

from fxquant.formats import (
    AdaLog,
    Format,
    Log2,
    LogSqrt2,
    SignBinary,
    SoftmaxBinary,
    Sulq,
    TanQ,
    TwinGelu,
    TwinSoftmax,
    Uniform,
)
from fxquant.formats.adalog import GELU_SHIFT

Inputs = Literal["probabilities", "gelu", "signed"]
FEW = settings(max_examples=15, deadline=None)
INFINITY = float("inf")


@dataclass(frozen=True)
class Case:
    """A format, the inputs that it is for, and what is expected of it."""

    form: Format
    inputs: Inputs
    distinct: int | None  # levels; None: fewer than codes, how many depends on the qparams
    is_idempotent: bool = True
    has_zero: bool = True
    gradient_beyond: float = 0.0  # where x is clipped


CASES = [
    *(Case(Uniform(width), "signed", 2**width) for width in (3, 8)),
    *(Case(Uniform(width, is_symmetric=True), "signed", 2**width - 1) for width in (3, 8)),
    *(Case(Log2(width, "ref_extra"), "probabilities", 2**width + 1) for width in (2, 4, 7)),
    *(Case(LogSqrt2(width, "ref_extra"), "probabilities", 2**width + 1) for width in (2, 4, 8)),
    *(Case(AdaLog(width, "ref_extra"), "probabilities", 2**width + 1) for width in (3, 4)),
    Case(AdaLog(4, "ref_extra", GELU_SHIFT), "gelu", 17, has_zero=False),
    *(Case(form(4, "reserve_top"), "probabilities", 16) for form in (Log2, LogSqrt2, AdaLog)),
    *(Case(form(4, "saturate"), "probabilities", 16, has_zero=False) for form in (Log2, LogSqrt2, AdaLog)),
    *(Case(Sulq(width), "probabilities", None, is_idempotent=False, has_zero=False) for width in (3, 4)),
    *(Case(TanQ(width), "probabilities", 2**width) for width in (3, 8)),
    Case(TanQ(4, is_inverse=True), "probabilities", 16),
    *(Case(TwinSoftmax(width), "probabilities", 2**width - 1) for width in (3, 4, 8)),
    *(Case(TwinGelu(width), "gelu", 2**width) for width in (3, 4, 8)),
    Case(SoftmaxBinary(), "probabilities", 2, gradient_beyond=1.0),
    Case(SoftmaxBinary(is_scaled=True), "probabilities", 2, gradient_beyond=1.0),
    Case(SignBinary(), "signed", 2, has_zero=False, gradient_beyond=1.0),
    Case(SignBinary(is_activation=True), "signed", 2, has_zero=False),
]
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.form.name)


def shaped(numbers: list[float], inputs: Inputs) -> Tensor:
    """Numbers in -1 .. 1 as one block [1, n] of the inputs that a format is for; fixed values keep its extent away from 0."""
    x = torch.tensor([[0.7, -0.4, 0.05, 0.0, *numbers]])
    return {"probabilities": x.abs(), "gelu": gelu(6 * x), "signed": 3 * x}[inputs]


NUMBERS = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30)
SAMPLE = shaped(torch.linspace(-1, 1, 57).tolist(), "signed")[0].div(3).tolist()


@EVERY
@FEW
@given(numbers=NUMBERS)
def test_values_rise_with_x(case: Case, numbers: list[float]) -> None:
    x = shaped(numbers, case.inputs).sort().values
    out = case.form.fake_quant(x, case.form.fit(x))
    assert (out.diff() >= 0).all()


@EVERY
@FEW
@given(numbers=NUMBERS)
def test_values_are_coded_as_themselves(case: Case, numbers: list[float]) -> None:
    x = shaped(numbers, case.inputs)
    qparams = case.form.fit(x)
    once = case.form.fake_quant(x, qparams)
    assert torch.equal(case.form.fake_quant(once, qparams), once) or not case.is_idempotent


@EVERY
@FEW
@given(numbers=NUMBERS)
def test_a_value_is_the_level_of_its_code(case: Case, numbers: list[float]) -> None:
    x = shaped(numbers, case.inputs)
    qparams = case.form.fit(x)
    codes, levels = case.form.quantize(x, qparams), case.form.levels(qparams)
    assert codes.dtype == torch.int64
    assert ((codes >= 0) & (codes < case.form.code_count)).all()
    assert torch.equal(levels.gather(-1, codes), case.form.fake_quant(x, qparams))


@EVERY
@FEW
@given(numbers=NUMBERS)
def test_gradients_change_no_value_and_vanish_where_x_is_clipped(case: Case, numbers: list[float]) -> None:
    x = shaped(numbers, case.inputs)
    qparams = case.form.fit(x)
    beyond = torch.tensor([[-INFINITY, -100.0, 100.0, INFINITY]])
    leaf = torch.cat([x, beyond], -1).requires_grad_()
    out = case.form.fake_quant(leaf, qparams)
    assert torch.equal(out.detach(), case.form.fake_quant(leaf.detach(), qparams))
    out.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad >= 0).all()
    assert leaf.grad[0, -4:].tolist() == [0, case.gradient_beyond, case.gradient_beyond, 0]


@EVERY
@FEW
@given(numbers=NUMBERS, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_coded_as_float32(case: Case, numbers: list[float], dtype: torch.dtype) -> None:
    x = shaped(numbers, case.inputs).to(dtype)
    qparams = case.form.fit(x)
    assert qparams.keys() == case.form.fit(x.to(torch.float32)).keys()
    out = case.form.fake_quant(x, qparams)
    assert out.dtype == dtype
    assert torch.equal(out, case.form.fake_quant(x.to(torch.float32), qparams).to(dtype))


@EVERY
@FEW
@given(first=NUMBERS)
def test_blocks_do_not_see_each_other(case: Case, first: list[float]) -> None:
    one = shaped(first, case.inputs)
    blocks = torch.cat([one, one.flip(-1) / 3])
    together = case.form.fake_quant(blocks, case.form.fit(blocks))
    alone = [case.form.fake_quant(block[None], case.form.fit(block[None])) for block in blocks]
    assert torch.equal(together, torch.cat(alone))


@EVERY
def test_the_table_form_is_exact_for_every_half_precision_number(case: Case) -> None:
    qparams = case.form.fit(shaped(SAMPLE, case.inputs))
    table = case.form.table(qparams)
    assert (table.thresholds.diff() > 0).all()
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype).to(torch.float32)
        x = x[~torch.isnan(x)]
        assert torch.equal(table.quantize(x), case.form.quantize(x[None], qparams)[0])
        assert torch.equal(table.fake_quant(x), case.form.fake_quant(x[None], qparams)[0])


@EVERY
def test_the_number_of_levels(case: Case) -> None:
    levels = case.form.levels(case.form.fit(shaped(SAMPLE, case.inputs)))
    assert levels.shape == (1, case.form.code_count)
    assert case.form.code_count <= 2**case.form.bits
    distinct = len(levels.unique())
    assert distinct == case.distinct or (case.distinct is None and distinct <= case.form.code_count)


@EVERY
def test_zero_is_exact_where_the_format_has_it(case: Case) -> None:
    qparams = case.form.fit(shaped(SAMPLE, case.inputs))
    assert (float(case.form.fake_quant(torch.zeros(1, 1), qparams)) == 0) == case.has_zero


@EVERY
@pytest.mark.parametrize(
    "block",
    [[0.0] * 5, [0.25] * 5, [1.0, 0, 0, 0, 0], [1e-30] * 5, [1e-44, 0, 0, 0, 0], [1.0, 1e-30, 1e-44, 0, 0]],
    ids=["zeros", "equal", "one-hot", "tiny", "subnormal", "spread"],
)
def test_degenerate_blocks_give_finite_values(case: Case, block: list[float]) -> None:
    x = torch.tensor([block])
    qparams = case.form.fit(x)
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in qparams.values())
    assert all(value.shape == (1, 1) for value in qparams.values())
    assert torch.isfinite(case.form.fake_quant(x, qparams)).all()


@EVERY
def test_infinities_saturate_and_nan_stays(case: Case) -> None:
    qparams = case.form.fit(shaped(SAMPLE, case.inputs))
    out = case.form.fake_quant(torch.tensor([[INFINITY, -INFINITY, float("nan")]]), qparams)[0]
    levels = case.form.levels(qparams)
    assert out[:2].tolist() == [levels.max(), levels.min()]
    assert torch.isnan(out[2])


@EVERY
def test_fake_quant_can_be_traced(case: Case) -> None:
    x = shaped(SAMPLE, case.inputs)
    qparams = dict(case.form.fit(x))
    graph = make_fx(lambda x, qparams: case.form.fake_quant(x, qparams))(x, qparams)
    other = x.flip(-1) / 2
    assert torch.equal(graph(other, qparams), case.form.fake_quant(other, qparams))


@EVERY
def test_fake_quant_can_be_compiled_without_a_break(case: Case) -> None:
    x = shaped(SAMPLE, case.inputs)
    qparams = dict(case.form.fit(x))
    compiled = torch.compile(case.form.fake_quant, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, qparams), case.form.fake_quant(x, qparams))
