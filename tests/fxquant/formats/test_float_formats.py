"""What holds of every float and block format: table form, fixed points, gradients, tracing, error and storage."""

import math

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.coding import Coding
from fxquant.format_schemes import FORMAT_SCHEMES
from fxquant.formats import FP4_BNB, NF4, NF4_DOUBLE, Format, Minifloat, Mx, Nvfp4, Uniform
from fxquant.formats.grids import E2M1, E2M3, E3M2, E4M3, E5M2, INT8
from fxquant.formats.llm_fp4 import split
from fxquant.granularity import PerGroup

FORMATS: list[Format] = [
    *(Minifloat(grid) for grid in (E5M2, E4M3, E3M2, E2M3, E2M1)),
    *(Mx(grid, "floor") for grid in (E5M2, E4M3, E3M2, E2M3, E2M1, INT8)),
    *(Mx(E2M1, rule) for rule in ("ceil", "even", "rceil")),
    Nvfp4(),
    NF4,
    NF4_DOUBLE,
    FP4_BNB,
    *(split(exponent, mantissa) for exponent, mantissa in ((3, 0), (2, 1), (1, 2), (3, 2), (4, 3))),
    split(2, 1, "paper"),
]
EACH = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
GENERATOR_SEED = 5


def blocks_of(rows: int = 4, n: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    return torch.randn(rows, n, generator=generator) * torch.logspace(-2, 1, rows)[:, None]


def every_half() -> Tensor:
    """Every bfloat16 and float16 but NaN, as float32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = torch.cat([bits.view(dtype).to(torch.float32) for dtype in (torch.bfloat16, torch.float16)])
    return x[~torch.isnan(x)]


def block_of(qparams: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row].reshape(1) for name, value in qparams.items()}


@EACH
def test_the_table_form_gives_the_same_values_and_codes(form: Format) -> None:
    one = block_of(dict(form.fit(blocks_of())), 1)
    table, x = form.table(one), every_half()
    assert torch.equal(table.fake_quant(x), form.fake_quant(x, one))
    seen = x.view(torch.int32) != torch.tensor(-0.0).view(torch.int32)  # comparisons cannot tell -0.0 from 0
    assert torch.equal(table.quantize(x)[seen], form.quantize(x, one)[seen])


@EACH
def test_thresholds_are_the_least_numbers_of_their_codes(form: Format) -> None:
    one = block_of(dict(form.fit(blocks_of())), 2)
    table = form.table(one)
    below = torch.nextafter(table.thresholds, torch.tensor(-math.inf))
    assert torch.equal(form.quantize(table.thresholds, one), table.codes[1:])
    assert torch.equal(form.quantize(below, one), table.codes[:-1])
    assert (table.values[1:] >= table.values[:-1]).all()


@EACH
def test_values_are_coded_as_themselves_and_zero_is_one_of_them(form: Format) -> None:
    if form is NF4_DOUBLE:
        pytest.skip("its codes are made with other scales than its values")
    qparams = form.fit(blocks_of())
    made = form.table(block_of(dict(qparams), 0)).codes
    levels = form.levels(qparams)[:, made]
    assert torch.equal(form.fake_quant(levels, qparams), levels)
    assert (levels == 0).any(-1).all()


@EACH
def test_a_block_of_zeros_stays_zero(form: Format) -> None:
    zeros = torch.zeros(2, 32)
    qparams = form.fit(zeros)
    assert torch.equal(form.fake_quant(zeros, qparams), zeros)
    assert all(torch.isfinite(value).all() for value in qparams.values())


@EACH
def test_nan_stays_nan_and_infinity_saturates(form: Format) -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1e-30, -1e38]])
    qparams = block_of(dict(form.fit(blocks_of())), 3)
    out = form.fake_quant(x, qparams)
    assert torch.isnan(out[0, 0])
    assert torch.isfinite(out[0, 1:]).all()
    assert float(out[0, 1]) == -float(out[0, 2]) == float(form.table(qparams).values[-1])


@EACH
def test_the_gradient_is_one_inside_and_zero_where_clipped(form: Format) -> None:
    x = torch.tensor([[-1e6, 1e-3, 0.3, 1e6]], requires_grad=True)
    out = form.fake_quant(x, form.fit(torch.tensor([[1.0, -2.0]])))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 0]]


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_trace_gives_the_same_and_the_dtype_stays(form: Format, dtype: torch.dtype) -> None:
    def run(x: Tensor) -> Tensor:
        return form.fake_quant(x, form.fit(x))

    x = blocks_of().to(dtype)
    traced = make_fx(run)(torch.ones_like(x))
    assert torch.equal(traced(x), run(x))
    assert run(x).dtype == dtype


@pytest.mark.parametrize(
    ("form", "n", "decibels"),
    [
        (NF4, 64, 20.7),
        (FP4_BNB, 64, 18.3),
        (Minifloat(E2M1), 64, 19.5),
        (Mx(E2M1, "floor"), 32, 18.8),
        (Mx(E2M1, "even"), 32, 19.0),
        (Mx(E2M1, "rceil"), 32, 18.8),
        (Mx(E2M1, "ceil"), 32, 16.8),
        (Nvfp4(), 16, 20.4),
        (Uniform(4), 128, 19.9),
        (Uniform(4), 32, 21.9),
        (Uniform(4, is_symmetric=True), 32, 20.3),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else str(value),
)
def test_the_error_on_gaussian_numbers_is_the_published_one(form: Format, n: int, decibels: float) -> None:
    x = torch.randn(2**18 // n, n, generator=torch.Generator().manual_seed(0))
    error = form.fake_quant(x, form.fit(x)) - x
    assert float(10 * torch.log10(x.square().sum() / error.square().sum())) == pytest.approx(decibels, abs=0.3)


@pytest.mark.parametrize(
    ("form", "distinct"),
    [
        *((Minifloat(grid), 2**grid.bits - 1) for grid in (E2M1, E2M3, E3M2)),
        (Minifloat(E4M3), 253),  # two codes are NaN
        (Minifloat(E5M2), 247),  # two are infinite and six NaN
        (Mx(INT8), 256),  # two's complement has one zero; the code of -2 is never made
        (split(1, 2), 15),
        (split(4, 3), 255),
        (NF4, 16),
        (FP4_BNB, 15),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else "",
)
def test_both_zeros_are_one_value_and_all_others_differ(form: Format, distinct: int) -> None:
    levels = form.levels(block_of(dict(form.fit(blocks_of())), 1))
    assert len(levels[torch.isfinite(levels)].unique()) == distinct


def test_the_best_scale_of_e2m1_for_gaussian_numbers() -> None:
    """linear-layers section 14: 2.92247856 / 6, with a mean squared error of .012685."""
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))

    def error(scale: float) -> float:
        return float((Minifloat(E2M1).fake_quant(x, {"scale": torch.tensor(scale)}) - x).square().mean())

    best = 2.92247856 / 6
    assert error(best) == pytest.approx(0.012685, rel=5e-3)
    assert error(best) < min(error(0.95 * best), error(1.05 * best))


@pytest.mark.parametrize(
    ("name", "bits"),
    {
        "fp8": 8 + 32 / 4096,
        "fp6-e3m2": 6 + 32 / 4096,
        "fp4": 4.5,
        "fp4-bnb": 4.5,
        "nf4": 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20,
        "mxfp8-e4m3": 8.25,
        "mxfp6-e2m3": 6.25,
        "mxfp4": 4.25,
        "mxint8": 8.25,
        "nvfp4": 4.5 + 32 / 2**20,
    }.items(),
)
def test_the_bits_of_a_weight(name: str, bits: float) -> None:
    assert FORMAT_SCHEMES[name].weight.bits_per_value(torch.empty(256, 4096)) == bits


def test_single_and_double_quantized_nf4_take_the_published_bits() -> None:
    assert NF4.storage_bits_per_value(2**20, 64) == 4.5
    assert NF4_DOUBLE.storage_bits_per_value(2**20, 64) == pytest.approx(4.127, abs=5e-4)


def test_a_short_last_group_counts_whole() -> None:
    coding = Coding(Mx(E2M1), PerGroup(32))
    x = torch.randn(3, 40)
    assert coding.bits_per_value(x) == 2 * (32 * 4 + 8) / 40
    assert coding.fake_quant(x).shape == x.shape


@pytest.mark.parametrize("name", FORMAT_SCHEMES)
def test_every_name_codes_a_weight_and_an_activation(name: str) -> None:
    operands = FORMAT_SCHEMES[name]
    for coding, x in ((operands.weight, torch.randn(6, 128)), (operands.activation, torch.randn(2, 3, 128))):
        if coding is not None:
            out = coding.fake_quant(x)
            assert out.shape == x.shape
            assert float((out - x).norm() / x.norm()) < 0.15
            size = coding.format.block_size
            assert size is None or coding.granularity == PerGroup(size)
    assert (operands.activation is None) == (name in {"nf4", "fp4-bnb"})


def test_names_of_formats_are_unique() -> None:
    assert len({form.name for form in FORMATS}) == len(FORMATS)
