"""Attention with logarithmic codes against its reference: every bit, on every instruction set and with one or two threads.

Against the specification in float (``passes.quantize.attention``) at most one code in a thousand differs, by one.
"""

import ctypes
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant.ops
from fxquant.calibration.attention import AttentionCalibration
from fxquant.calibration.site import StaticCoding
from fxquant.coding import Coding
from fxquant.config import ISAS
from fxquant.formats import AdaLog, Format, Log2, LogSqrt2, Uniform
from fxquant.formats.log_codes import LogFormat, ZeroPolicy
from fxquant.granularity import Granularity, PerChannel, PerTensor
from fxquant.lowering.cpu.build import load_library
from fxquant.passes.fuse.log_attention import arguments, codes_of
from fxquant.passes.quantize.attention import attention as specification
from fxquant.reference import log_attention as reference
from fxquant.reference.log_softmax_codes import adalog_matmul, codes_from_logits, log2_matmul, log_sqrt2_matmul
from fxquant.testing.kernels import LEVELS, at_most

assert fxquant.ops.LIBRARY is not None
HEADS, WHOLE = PerChannel(1), PerTensor()
PARTS = ("out", "scores", "lse", "codes", "sums")
QPARAMS = ("q_scale", "q_zero", "k_scale", "k_zero", "v_scale", "v_zero", "p_scale", "p_base")
ARGUMENTS = (*QPARAMS, "q_top", "k_top", "v_top", "per_channel", "family", "width", "codes")
FORMATS: list[LogFormat] = [
    Log2(4),
    Log2(3, "reserve_top"),
    Log2(6),
    LogSqrt2(4),
    LogSqrt2(5, "reserve_top"),
    AdaLog(4),
    AdaLog(3, "reserve_top"),
    AdaLog(6),
]
# batch, heads, key heads, queries, keys, head size, head size of the values
SHAPES = {
    "one element": (1, 1, 1, 1, 1, 1, 1),
    "one row": (1, 2, 2, 1, 37, 32, 32),
    "ragged everywhere": (1, 4, 4, 97, 131, 33, 33),
    "value heads of another size": (1, 2, 2, 20, 40, 48, 25),
    "three heads share their packing, rows of two tasks": (1, 3, 3, 130, 70, 40, 40),
    "grouped heads": (2, 6, 2, 50, 70, 64, 64),
    "many keys": (1, 1, 1, 9, 700, 16, 16),
    "largest head": (1, 1, 1, 9, 30, 256, 256),
    "more queries than keys": (1, 2, 2, 90, 33, 32, 32),
}


@pytest.fixture(autouse=True)
def library() -> None:
    load_library()


def sample(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of [B, N, H, d] memory; keys have a bias, as those of real models."""
    batch, heads, key_heads, n, m, d, e = SHAPES[name]
    sizes = ((n, heads, d), (m, key_heads, d), (m, key_heads, e))
    q, k, v = (torch.randn(batch, *size).transpose(1, 2) for size in sizes)
    return q, k + torch.randn(d), v


def coded(x: Tensor, form: Format, granularity: Granularity) -> StaticCoding:
    coding = Coding(form, granularity)
    return StaticCoding(coding, coding.fit(x))


def known_of(
    q: Tensor, k: Tensor, v: Tensor, form: LogFormat, per: Granularity = WHOLE, uniform: Format | None = None
) -> AttentionCalibration:
    """Codings by the extent of each operand. Scales of the weights lie below 1 and bases differ, as searches find them."""
    uniform = uniform or Uniform(8)
    of_p = WHOLE if per != HEADS else HEADS
    blocks = q.shape[1] if of_p == HEADS else 1
    qparams = {"scale": torch.linspace(1.0, 1.0 if isinstance(form, Log2) else 0.4, blocks)[:, None]}
    if isinstance(form, AdaLog):
        qparams["base"] = torch.arange(40 >> (form.width - 3), 999)[:blocks, None].float()
    of_qk = WHOLE if per == PerChannel(-1) else per
    return AttentionCalibration(
        coded(q, uniform, of_qk),
        coded(k, uniform, of_qk),
        StaticCoding(Coding(form, of_p), qparams),
        coded(v, uniform, per),
    )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: AttentionCalibration,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    trace: bool = True,
) -> Any:
    op = torch.ops.fxquant.attention_log_trace if trace else torch.ops.fxquant.attention_log
    return op(q, k, v, mask, causal, scale, *arguments(q.dim(), known, known.tensors()))


def wanted_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: AttentionCalibration,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> reference.Trace:
    given = arguments(q.dim(), known, known.tensors())
    axis = -1 if given[11] else 1
    qparams = {name: value for name, value in known.tensors().items() if name[0] in "qkv"}
    assert known.p is not None
    return reference.attention_log(q, k, v, mask, causal, scale, qparams, given[8:11], axis, codes_of(known.p))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where the other is."""
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_equals_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: AttentionCalibration,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> reference.Trace:
    wanted = wanted_of(q, k, v, known, mask, causal, scale)
    seen = torch.ones(wanted.scores.shape[-2:], dtype=torch.bool)
    seen = seen.tril() if causal else seen
    threads = torch.get_num_threads()
    for isa in LEVELS:
        for count in (1, 2):
            torch.set_num_threads(count)
            with at_most(isa):
                parts = run(q, k, v, known, mask, causal, scale)
                plain = run(q, k, v, known, mask, causal, scale, trace=False)
            torch.set_num_threads(threads)
            for name, part in zip(PARTS, parts, strict=True):
                of_pairs = name in ("scores", "codes")
                x, y = (torch.where(seen, t, 0) if of_pairs else t for t in (part, getattr(wanted, name)))
                assert same(x, y), f"{ISAS[isa]}, {count} threads: {name}"
            assert same(parts[0], plain), f"{ISAS[isa]}, {count} threads: the trace changes the result"
    return wanted


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_the_reference(name: str, form: LogFormat, causal: bool) -> None:
    q, k, v = sample(name)
    assert_equals_reference(q, k, v, known_of(q, k, v, form, HEADS), causal=causal)


@pytest.mark.parametrize("per", [WHOLE, HEADS, PerChannel(-1)], ids=str)
@pytest.mark.parametrize("uniform", [Uniform(4), Uniform(6, is_symmetric=True), Uniform(8, power_of_two=True)], ids=str)
def test_codings_of_the_operands(uniform: Uniform, per: Granularity) -> None:
    q, k, v = sample("grouped heads")
    assert_equals_reference(q, k, v, known_of(q, k, v, LogSqrt2(4), per, uniform), scale=0.3)


def test_three_axes() -> None:
    q, k, v = (x[:, 0] for x in sample("ragged everywhere"))
    for per in (WHOLE, PerChannel(-1)):
        assert_equals_reference(q, k, v, known_of(q, k, v, AdaLog(4), per), causal=True)


def test_values_at_the_limits_of_their_codes() -> None:
    """All codes are the greatest or the smallest: scores and sums end at their bound."""
    signs = torch.where(torch.rand(1, 1, 1, 256) < 0.5, -1.0, 1.0)
    q = torch.cat([signs, -signs], -2).repeat(1, 1, 8, 1)
    k = torch.cat([q, q], -2)
    v = torch.ones(1, 1, 32, 24)
    for form in FORMATS:
        known = known_of(q, k, v, form)
        wanted = assert_equals_reference(q, k, v, known)
        assert float(wanted.scores.abs().max()) > 20
    symmetric = known_of(q, k, v, Log2(4), WHOLE, Uniform(8, is_symmetric=True))
    assert float(assert_equals_reference(q, k, v, symmetric).sums.max()) == 127 * 2**11 * 16


def masks(n: int, m: int) -> dict[str, Tensor]:
    seen = torch.rand(n, m) > 0.4
    seen[:, 0] = True
    hidden_row = seen.clone()
    hidden_row[n // 2] = False
    added = torch.randn(n, m)
    lowest = torch.finfo(torch.float32).min
    return {
        "bool, a row hidden": hidden_row,
        "bool, of keys": seen[:1],
        "bool, a batch": seen.expand(2, 1, n, m),
        "added": added,
        "added a head": torch.randn(1, 6, n, m),
        "added, transposed": torch.randn(m, n).t(),
        "-inf, a row hidden": torch.where(hidden_row, added, -math.inf),
        "lowest, a row hidden": torch.where(hidden_row, 0.0, lowest),
        "all hidden": torch.full((n, m), -math.inf),
        "NaN": torch.where(seen, 0.0, math.nan),
        "+inf": torch.where(seen, 0.0, math.inf),
    }


@pytest.mark.parametrize("name", masks(2, 2))
def test_masks(name: str) -> None:
    q, k, v = sample("grouped heads")
    mask = masks(50, 70)[name]
    wanted = assert_equals_reference(q, k, v, known_of(q, k, v, Log2(4)), mask)
    if "row hidden" in name and "lowest" not in name:
        assert torch.equal(wanted.out[:, :, 25], torch.zeros_like(wanted.out[:, :, 25]))
    assert bool(wanted.out.isnan().any()) == (name in ("NaN", "+inf"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("uniform", [Uniform(8), Uniform(4)], ids=str)
def test_what_is_not_finite(uniform: Uniform, operand: str, value: float) -> None:
    """NaN shows in its row (q), in every row (k) or in its channel (v); infinities saturate."""
    q, k, v = (x.clone() for x in sample("value heads of another size"))
    known = known_of(q, k, v, AdaLog(4), HEADS, uniform)
    {"q": q, "k": k, "v": v}[operand][0, 1, 7, 3] = value
    out = assert_equals_reference(q, k, v, known).out
    assert not out[:, 0].isnan().any()
    bad = {"q": out[0, 1, 7], "k": out[0, 1], "v": out[0, 1, :, 3]}[operand]
    assert bool(bad.isnan().all()) == math.isnan(value)
    assert int(out.isnan().sum()) == (bad.numel() if math.isnan(value) else 0)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_float_scores(form: LogFormat) -> None:
    """Without codes of q and k the scores differ in their last bits; everything that follows from them does not."""
    q, k, v = sample("grouped heads")
    whole = known_of(q, k, v, form)
    known = AttentionCalibration(p=whole.p, v=whole.v)
    assert known.p is not None
    wanted = wanted_of(q, k, v, known)
    codes = codes_of(known.p)
    for isa in LEVELS:
        with at_most(isa):
            got = reference.Trace(*run(q, k, v, known))
        torch.testing.assert_close(got.scores, wanted.scores, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.lse, reference.log_sums(got.scores, codes.scale.reshape(()))), ISAS[isa]
        factor = codes.factors.expand(got.lse.shape)
        assert torch.equal(got.codes, reference.code_scores(got.scores, got.lse, factor, codes.codes).to(torch.int16)), ISAS[
            isa
        ]
        assert float((got.codes != wanted.codes).double().mean()) < 1e-3


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("name", ["ragged everywhere", "grouped heads"])
def test_the_specification_has_the_same_codes_but_next_to_thresholds(name: str, form: LogFormat) -> None:
    q, k, v = sample(name)
    known = known_of(q, k, v, form, HEADS)
    got = reference.Trace(*run(q, k, v, known))
    exact = specification({"q": q, "k": k, "v": v, **known.tensors()}, known)
    close = torch.isclose(got.out, exact, atol=2e-5, rtol=1e-5)
    assert float((~close).double().mean()) < 0.05
    assert float((got.out - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert known.p is not None
    assert known.q is not None
    coded_q, coded_k = known.fake_quant("q", q, known.tensors()), known.fake_quant("k", k, known.tensors())
    logits = coded_q.double() @ coded_k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT / math.sqrt(q.shape[-1])
    codes = known.p.coding.granularity.blocks(torch.softmax(logits, -1).float())
    wanted = known.p.coding.granularity.restore(form.quantize(codes, known.p.qparams), logits)
    assert float((got.codes != wanted).double().mean()) < 1e-3
    assert int((got.codes - wanted).abs().max()) <= 1


def one_row(logits: Tensor, v: Tensor, form: LogFormat, scale: float = 1.0, **base: float) -> reference.Trace:
    """Attention of one row with these logits [M] to values v [M], codes of step 1."""
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, len(logits), 4)
    one = torch.ones(1, 1)
    qparams = {"scale": scale * one, **{name: value * one for name, value in base.items()}}
    known = AttentionCalibration(
        p=StaticCoding(Coding(form, WHOLE), qparams),
        v=StaticCoding(Coding(Uniform(8, is_symmetric=True), WHOLE), {"scale": one}),
    )
    return reference.Trace(*run(q, k, v.float().reshape(1, 1, -1, 1), known, logits.reshape(1, -1)))


def test_the_worked_example_of_codes() -> None:
    logits = torch.tensor([4.0, 1.0, 0.0, -2.0])
    assert one_row(logits, torch.ones(4), Log2(4)).codes.tolist() == [[[[0, 4, 6, 9]]]]
    assert one_row(logits, torch.ones(4), LogSqrt2(5)).codes.tolist() == [[[[0, 9, 12, 18]]]]


def test_the_worked_example_of_products() -> None:
    logits, v = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.02, 0.02]).log(), torch.tensor([12, -7, 100, -33, 5, 64])
    log2, root2 = one_row(logits, v, Log2(4)), one_row(logits, v, LogSqrt2(4))
    assert (log2.codes.tolist(), float(log2.sums), float(log2.out)) == ([[[[1, 2, 3, 4, 6, 6]]]], 4036 * 2**7, 15.765625)
    assert root2.codes.tolist() == [[[[2, 3, 7, 8, 11, 11]]]]
    assert root2.sums.flatten().tolist() == [1008, 1428]
    assert float(root2.out) == pytest.approx(11.82616002761242, rel=1e-6)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("keys", [1, 16, 197, 4096])
def test_planes_have_the_values_of_the_format(form: LogFormat, keys: int) -> None:
    x = torch.rand(1, 1, 2, 2)
    known = known_of(x, x, x, form)
    assert known.p is not None
    planes = reference.planes_of(codes_of(known.p), keys, 255)
    assert bool(((planes.weights != 0).sum(1) <= 1).all())
    values = (planes.weights.double() * planes.units.double()[..., None]).sum(1)
    torch.testing.assert_close(values.float(), form.levels(known.p.qparams), rtol=1e-6, atol=2.0**-31)


@pytest.mark.parametrize("zero", ["ref_extra", "reserve_top"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 6), keys=st.integers(1, 600), width=st.integers(3, 5))
def test_sums_are_those_of_shifts_and_adds(zero: ZeroPolicy, seed: int, spread: float, keys: int, width: int) -> None:
    """Against the exact integer products of ``reference.log_softmax_codes``, with values of the largest magnitude."""
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(keys, generator=g)
    v = 127 * torch.ones(keys, dtype=torch.int64)
    base = int(torch.randint(5, 592 >> width, (), generator=g))  # 16 octaves at most
    for form in (Log2(width, zero), LogSqrt2(width, zero), AdaLog(width, zero)):
        got = one_row(logits, v, form, **({"base": base} if isinstance(form, AdaLog) else {}))
        codes, values = got.codes.to(torch.int64)[0, 0], v[:, None]
        k = {Log2: 1.0, LogSqrt2: 2.0, AdaLog: 37 / base}[type(form)]
        clear = codes_from_logits(logits[None], torch.logsumexp(logits, 0).reshape(1, 1), k, form.code_count - 1)
        assert int((codes - clear).abs().max()) <= 1
        if isinstance(form, LogSqrt2):
            even, odd = log_sqrt2_matmul(codes, values, 40, form.zero_code)
            exact = (float(even) + math.sqrt(2) * float(odd)) * 2.0**-40
        elif isinstance(form, AdaLog):
            table = form.shifts_and_mantissas(torch.arange(form.code_count), torch.tensor(float(base)))
            total = adalog_matmul(codes, values, *table, form.zero_code)
            exact = float(total) * 2.0 ** -int(table[0].max()) / form.denominator
        else:
            exact = float(log2_matmul(codes, values, 40, form.zero_code)) * 2.0**-40
        qparams = {"scale": torch.ones(1, 1), "base": torch.full((1, 1), float(base))}
        is_exact = reference.planes_of(codes_of(StaticCoding(Coding(form, WHOLE), qparams)), keys, 127).is_exact
        assert not is_exact or float(got.sums.abs().max()) < reference.EXACT
        assert is_exact or isinstance(form, AdaLog)
        assert float(got.out) == pytest.approx(exact, rel=1e-6, abs=keys * 127 * 2.0**-31)


def test_bad_arguments_are_refused() -> None:
    q, k, v = sample("value heads of another size")
    known = known_of(q, k, v, Log2(4), HEADS)
    given = list(arguments(4, known, known.tensors()))

    def call(**changed: Any) -> Tensor:
        values = [changed.get(name, value) for name, value in zip(ARGUMENTS, given, strict=True)]
        return torch.ops.fxquant.attention_log(q, k, v, None, False, None, *values)  # type: ignore[no-any-return]

    three, two = torch.ones(3), torch.ones(2)
    with pytest.raises(RuntimeError, match="q has 3 values, 1 or 2 are needed"):
        call(q_scale=three)
    with pytest.raises(RuntimeError, match="q and k both have codes, or none has"):
        call(q_scale=None, q_zero=None)
    with pytest.raises(RuntimeError, match="v has another number of zero points than of scales"):
        call(v_zero=torch.ones(1))
    with pytest.raises(RuntimeError, match="AdaLog alone has a base"):
        call(p_base=two)
    with pytest.raises(RuntimeError, match="no such codes: family 3, 4 bits, 16 codes"):
        call(family=3)
    with pytest.raises(RuntimeError, match="k must be float32"):
        call(k_scale=two.double())
    wide = torch.randn(1, 1, 2, 257)
    with pytest.raises(RuntimeError, match="a head has 257 values, at most 256 have exact sums"):
        run(wide, wide, wide, known_of(wide, wide, wide, Log2(4)))


def test_the_operator_is_a_good_citizen() -> None:
    q, k, v = sample("grouped heads")
    known = known_of(q, k, v, AdaLog(4), HEADS)
    torch.library.opcheck(
        torch.ops.fxquant.attention_log,
        (q, k, v, None, True, None, *arguments(4, known, known.tensors())),
        test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"],
    )


def test_the_library_exports_the_c_functions() -> None:
    library = ctypes.CDLL(str(load_library()))
    for name in ("fxquant_attention_log", "fxquant_attention_log_planes"):
        assert isinstance(getattr(library, name), ctypes._CFuncPtr)  # type: ignore[attr-defined]
