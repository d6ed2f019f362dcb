"""Logarithmic formats: exact codes for every float32 tried, worked examples, zero policies."""

import math

import pytest
import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats import AdaLog, Format, Log2, LogSqrt2, Sulq
from fxquant.formats.adalog import BASES, FLOOR, GELU_SHIFT, PARTS
from fxquant.formats.log_codes import LogFormat, log2_codes, log_sqrt2_codes, powers_of_two

A = torch.tensor([[1, 0.75, 0.7, 0.5, 0.3, 0.1, 0.02, 1e-3, 3e-5, 2e-5, 0]])
A8 = torch.tensor([[1, 0.7, 0.5, 0.3, 0.1, 0.02, 1e-3, 0]])
ONE = torch.ones(1, 1)


def binade() -> Tensor:
    """Every float32 in [0.5, 1)."""
    return torch.arange(0x3F000000, 0x3F800000, dtype=torch.int32).view(torch.float32)


def test_codes_are_exact_for_every_mantissa() -> None:
    y = binade()
    exact = -torch.log2(y.to(torch.float64))
    assert torch.equal(log2_codes(y), torch.round(exact).to(torch.int64))
    assert torch.equal(log_sqrt2_codes(y), torch.round(2 * exact).to(torch.int64))


def test_single_precision_log2_is_not_good_enough() -> None:
    y = binade()
    assert int((torch.round(-torch.log2(y)).to(torch.int64) != log2_codes(y)).sum()) == 1
    assert torch.equal(torch.round(-2 * torch.log2(y)).to(torch.int64), log_sqrt2_codes(y)), "of log-√2 it is"


def test_codes_are_exact_for_every_exponent() -> None:
    exponents = torch.arange(-149, 128)
    y = torch.ldexp(torch.ones(277, dtype=torch.float64), exponents).to(torch.float32)
    assert torch.equal(log2_codes(y), -exponents)
    assert torch.equal(log_sqrt2_codes(y), -2 * exponents)
    assert torch.equal(powers_of_two(exponents), y)
    assert powers_of_two(torch.tensor([-1000, -150, 128, 1000])).tolist() == [0, 0, math.inf, math.inf]
    assert int(log2_codes(torch.zeros(()))) > 150


FORMS = [
    Log2(4),
    LogSqrt2(4),
    LogSqrt2(8, "saturate"),
    AdaLog(4),
    AdaLog(8, "reserve_top"),
    AdaLog(4, "ref_extra", GELU_SHIFT),
    Sulq(4),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_table_is_exact_for_every_mantissa(form: Format) -> None:
    qparams = {name: value * 0.93 if name == "scale" else value for name, value in form.fit(A).items()}
    table, x = form.table(qparams), binade()
    assert torch.equal(table.quantize(x), form.quantize(x[None], qparams)[0])


@pytest.mark.parametrize("base", range(1, BASES[-1] + 1))
def test_adalog_codes_are_exact_at_every_threshold(base: int) -> None:
    """Integers decide: with y = m 2^e, the code is ≤ c where y^74 > 2^-((2 c + 1) q), or equal and c even."""
    last = min(255, math.ceil(-math.log2(FLOOR) * PARTS / base - 0.5) - 1)
    thresholds = torch.tensor([2.0 ** (-(2 * c + 1) * base / (2 * PARTS)) for c in range(last)], dtype=torch.float64)
    bits = thresholds.to(torch.float32).view(torch.int32)
    y = torch.stack([bits - 1, bits, bits + 1]).view(torch.float32)
    found = AdaLog(8).rounded_log(y, {"scale": ONE, "base": torch.full((1, 1), float(base))})
    assert found.tolist() == [[_exact(float(one), c, base) for c, one in enumerate(row)] for row in y]


def _exact(y: float, c: int, base: int) -> int:
    """The code, c or c + 1, of y near the threshold between them."""
    mantissa, exponent = math.frexp(y)
    power = (int(mantissa * 2**24)) ** (2 * PARTS)
    bound = (24 - exponent) * 2 * PARTS - (2 * c + 1) * base  # y^74 > 2^-((2 c + 1) q)  ⇔  power > 2^bound
    limit = 2**bound if bound >= 0 else 0
    return c if power > limit or (power == limit and c % 2 == 0) else c + 1


def test_a_tie_of_adalog_goes_to_the_even_code() -> None:
    y = torch.tensor([[2.0**-1, 2.0**-3, 2.0**-5]])  # base 74: log4
    assert AdaLog(4).quantize(y, {"scale": ONE, "base": 74 * ONE}).tolist() == [[0, 2, 2]]


@pytest.mark.parametrize("width", [3, 4, 6])
def test_adalog_tables_fall_strictly_and_code_themselves(width: int) -> None:
    form = AdaLog(width, "saturate")
    for base in BASES:
        qparams = {"scale": ONE, "base": torch.full((1, 1), float(base))}
        levels = form.levels(qparams)
        levels = levels[levels >= 2 * FLOOR][None]
        assert (levels.diff() < 0).all()
        assert torch.equal(form.fake_quant(levels, qparams), levels)


@pytest.mark.parametrize(("width", "largest"), [(4, 118), (6, 29), (8, 7)])
def test_zero_has_the_zero_code_of_adalog_up_to_a_base(width: int, largest: int) -> None:
    """vit-quantizers 9.5: the floor of 1e-15 is rne(1843.7 / q), the zero code where that is n or more, else about 2^-50."""
    form, zero = AdaLog(width), torch.zeros(1, 1)
    values = [float(form.fake_quant(zero, {"scale": ONE, "base": base * ONE})) for base in (largest, largest + 1)]
    assert values[0] == 0
    assert values[1] == pytest.approx(2.0**-50, rel=20)
    assert 0 < values[1] < 2.0**-45


def test_powers_of_two_with_a_sign_have_the_published_error_on_gaussian_numbers() -> None:
    """linear-layers 17.3: 13.9 dB, however many exponents there are."""
    x = torch.randn(1, 2**16, generator=torch.Generator().manual_seed(0))
    for scale in (4.0, 64.0):
        value = Log2(6, "saturate").fake_quant(x.abs(), {"scale": scale * ONE}) * x.sign()
        assert float(10 * torch.log10(x.square().sum() / (value - x).square().sum())) == pytest.approx(13.9, abs=0.1)


def test_adalog_of_eight_bits_is_finer_than_of_four() -> None:
    x = torch.softmax(torch.randn(64, 197), -1).reshape(1, -1)
    errors = [float((form.fake_quant(x, form.fit(x)) - x).square().mean()) for form in (AdaLog(4), AdaLog(8))]
    assert errors[1] < errors[0] / 50


def test_the_worked_example_of_log2() -> None:
    form = Log2(4)
    qparams = form.fit(A)
    assert form.quantize(A, qparams).clamp_max(15).tolist() == [[0, 0, 1, 1, 2, 3, 6, 10, 15, 15, 15]]
    wanted = [1, 1, 0.5, 0.5, 0.25, 0.125, 0.015625, 9.765625e-4, 2.0**-15, 0, 0]
    assert form.fake_quant(A, qparams).tolist() == [wanted]


@pytest.mark.parametrize(
    ("width", "scale", "codes", "values"),
    [
        (
            4,
            1.0,
            [0, 1, 1, 2, 3, 7, 11, 15, 15, 15, 15],
            [1, 0.707107, 0.707107, 0.5, 0.353553, 0.088388, 0.022097, 0, 0, 0, 0],
        ),
        (3, 1.0, [0, 1, 1, 2, 3, 7, 7, 7, 7, 7, 7], [1, 0.707107, 0.707107, 0.5, 0.353553, 0.088388, 0, 0, 0, 0, 0]),
        (4, 0.8, [0, 0, 0, 1, 3, 6, 11, 15, 15, 15, 15], [0.8, 0.8, 0.8, 0.565685, 0.282843, 0.1, 0.017678, 0, 0, 0, 0]),
    ],
)
def test_the_worked_examples_of_log_sqrt2(width: int, scale: float, codes: list[int], values: list[float]) -> None:
    form, qparams = LogSqrt2(width), {"scale": scale * ONE}
    assert form.quantize(A, qparams).clamp_max((1 << width) - 1).tolist() == [codes]
    assert form.fake_quant(A, qparams)[0].tolist() == pytest.approx(values, abs=1e-6)
    smallest = scale * 2.0 ** (-((1 << width) - 1) / 2)
    assert float(form.levels(qparams)[0, -2]) == pytest.approx(smallest)


def test_the_worked_example_of_adalog() -> None:
    form, qparams = AdaLog(4), {"scale": ONE, "base": 20 * ONE}
    shifts, mantissas = form.shifts_and_mantissas(torch.arange(16), torch.tensor(20.0))
    assert shifts.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8]
    assert mantissas.tolist() == [30, 21, 28, 19, 27, 18, 25, 17, 24, 16, 23, 16, 21, 29, 20, 28]
    assert form.denominator == 30
    levels = [1, 0.7, 0.466667, 0.316667, 0.225, 0.15, 0.104167, 0.070833, 0.05, 0.033333, 0.023958, 0.016667]
    levels += [0.010937, 0.007552, 0.005208, 0.003646]
    assert form.levels(qparams)[0, :16].tolist() == pytest.approx(levels, abs=1e-6)
    assert form.quantize(A8, qparams).clamp_max(15).tolist() == [[0, 1, 2, 3, 6, 10, 15, 15]]
    wanted = [1, 0.7, 0.466667, 0.316667, 0.104167, 0.023958, 0, 0]
    assert form.fake_quant(A8, qparams)[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_adalog_with_base_37_is_log2() -> None:
    form, qparams = AdaLog(3), {"scale": ONE, "base": 37 * ONE}
    assert set(form.shifts_and_mantissas(torch.arange(8), torch.tensor(37.0))[1].tolist()) == {14}
    assert form.quantize(A8, qparams).clamp_max(7).tolist() == [[0, 1, 1, 2, 3, 6, 7, 7]]
    assert form.fake_quant(A8, qparams).tolist() == [[1, 0.5, 0.5, 0.25, 0.125, 0.015625, 0, 0]]
    assert torch.equal(form.levels(qparams), Log2(3).levels({"scale": ONE}))


def test_the_worked_example_of_adalog_after_gelu() -> None:
    form, qparams = AdaLog(4, "ref_extra", GELU_SHIFT), {"scale": 3 * ONE, "base": 20 * ONE}
    x = torch.tensor([[-0.17, -0.1, -0.02, 0, 0.05, 0.4, 1.7, 3.2]])
    assert form.quantize(x, qparams).clamp_max(15).tolist() == [[15, 10, 8, 8, 7, 4, 1, 0]]
    wanted = [-0.169971, -0.098096, -0.019971, -0.019971, 0.042529, 0.505029, 1.930029, 2.830029]
    assert form.fake_quant(x, qparams)[0].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("family", [Log2, LogSqrt2, AdaLog])
def test_zero_policies_differ_below_the_range_only(family: type[LogFormat]) -> None:
    extra, reserved, saturating = family(3, "ref_extra"), family(3, "reserve_top"), family(3, "saturate")
    qparams = extra.fit(A)
    assert [form.bits for form in (extra, reserved, saturating)] == [4, 3, 3]
    assert [form.zero_code for form in (extra, reserved, saturating)] == [8, 7, None]
    levels = saturating.levels(qparams)[0]
    assert torch.equal(extra.levels(qparams)[0], torch.cat([levels, torch.zeros(1)]))
    assert torch.equal(reserved.levels(qparams)[0], torch.cat([levels[:-1], torch.zeros(1)]))


def test_the_gradient_is_that_of_a_rounded_logarithm() -> None:
    x = torch.tensor([[0.3, 0.6, 1e-4, 1.5]], requires_grad=True)
    form = Log2(3)
    form.fake_quant(x, form.fit(x.detach())).sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([0.25 / 0.3, 0.5 / 0.6, 0, 0])


def test_formats_that_do_not_exist_are_refused() -> None:
    with pytest.raises(FormatError, match="log2 codes have 2 to 7 bits, not 8"):
        Log2(8)
    with pytest.raises(FormatError, match="adalog codes have 2 to 8 bits, not 1"):
        AdaLog(1)
    with pytest.raises(FormatError, match="one of ref_extra, reserve_top, saturate, not 'other'"):
        LogSqrt2(4, "other")  # type: ignore[arg-type]
