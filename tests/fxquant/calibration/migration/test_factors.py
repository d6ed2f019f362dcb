"""Factors: worked examples of SmoothQuant, SmoothQuant+ and AWQ, exact functions in float64, limits, shared heads."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from fxquant.calibration.migration import awq, fireq, power, smoothquant, smoothquant_plus
from fxquant.calibration.migration import factor as factors
from fxquant.calibration.rounding import nearest
from fxquant.calibration.seen import Seen, see
from fxquant.errors import CalibrationError
from fxquant.formats import Uniform
from fxquant.granularity import PerGroup
from fxquant.reference import dequantize_weight

X = torch.tensor([[1, -16, 2, 0.5], [-4, 9, -1, -1]])
W = torch.tensor([[1, -2, 0.5], [1, 0.5, -1], [2, -1, 0], [-4, 1, 2]]).T
# The data of SmoothQuant+ and AWQ: 4 outputs, 8 inputs, 6 tokens, affine 4-bit codes in groups of 4.
WAVES = torch.tensor([[0.5 * torch.sin(torch.tensor(3.0 * i + 5 * j + 1)) for j in range(8)] for i in range(4)])
SIZES = torch.tensor([1.0, 1, 1, 20, 1, 1, 8, 1])
ROWS = torch.tensor([[float(SIZES[j] * torch.cos(torch.tensor(1.7 * t * (j + 1) + j))) for j in range(8)] for t in range(6)])


def affine(weight: Tensor) -> Tensor:
    """4-bit affine codes, zero among the values, in groups of 4, rounded and decoded."""
    form, groups = Uniform(4), PerGroup(4)
    blocks = groups.blocks(weight)
    return groups.restore(form.fake_quant(blocks, form.fit(blocks)), weight)


def squares(factor: Tensor) -> float:
    """‖X Wᵀ - (X / f) Q(f W)ᵀ‖² of the waves."""
    return float((ROWS @ WAVES.T - (ROWS / factor) @ affine(WAVES * factor).T).square().sum())


def test_the_worked_example_of_smoothquant() -> None:
    factor = smoothquant.factor(see(X), [W])
    torch.testing.assert_close(factor, torch.tensor([2**0.5, 4, 1, 0.5]))
    torch.testing.assert_close(X / factor, torch.tensor([[0.70711, -4, 2, 1], [-2.82843, 2.25, -1, -2]]), atol=1e-5, rtol=0)
    product = (X / factor) @ (W * factor).T
    torch.testing.assert_close(product, torch.tensor([[-13, -11.5, 17.5], [7, 12.5, -13]]))


def symmetric(x: Tensor, bits: int) -> Tensor:
    """Rows rounded and decoded in float64: many quotients of the example are ties, which float32 breaks at random."""
    scale = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded: Tensor = torch.round(x / scale) * scale
    return rounded


@pytest.mark.parametrize(("bits", "before", "after"), [(8, 6.648e-3, 2.935e-4), (4, 1.0387, 0.9505)])
def test_the_worked_example_of_what_smoothquant_gains(bits: int, before: float, after: float) -> None:
    x, weight = X.to(torch.float64), W.to(torch.float64)

    def error(factor: Tensor) -> float:
        product = symmetric(x / factor, bits) @ symmetric(weight * factor, bits).T
        return float((product - x @ weight.T).square().mean())

    assert error(torch.ones(4)) == pytest.approx(before, rel=1e-3)
    assert error(smoothquant.factor(see(X), [W])) == pytest.approx(after, rel=1e-3)


def test_powers_of_two_leave_float32_products_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(20, 32, generator=generator), torch.randn(5, 32, generator=generator)
    factor = smoothquant.factor(see(x * torch.logspace(-2, 2, 32)), [weight], power_of_two=True)
    assert torch.equal(factor, torch.exp2(torch.log2(factor).round()))
    assert len(factor.unique()) > 2
    assert torch.equal((x / factor)[:, None] * (weight * factor), x[:, None] * weight)


def test_the_worked_example_of_smoothquant_plus() -> None:
    seen = see(ROWS)
    assert squares(torch.ones(8)) == pytest.approx(1.012305, rel=1e-4)
    found = smoothquant_plus.search(lambda alpha: squares(smoothquant.factor(seen, [WAVES], alpha)))
    assert found.alpha == 0.2
    assert len(found.errors) == 21
    # α = 0 is left out: every column has a tie there, so float32 gives 0.4757 and float64 0.578769.
    expected = {
        0.1: 0.160929,
        0.2: 0.055598,
        0.4: 0.056566,
        0.5: 0.132901,
        0.55: 0.082239,
        0.85: 0.150886,
        1: 0.138727,
    }
    for alpha, error in expected.items():
        assert found.errors[alpha] == pytest.approx(error, rel=1e-4), alpha


def test_the_worked_example_of_awq() -> None:
    found = awq.errors(see(ROWS), [WAVES], affine)
    expected = {0: 0.042179, 0.1: 0.018644, 0.15: 0.00696, 0.45: 0.003899, 0.5: 0.007313, 0.95: 0.013763}
    for ratio, error in expected.items():
        assert found[ratio] == pytest.approx(error, rel=1e-3), ratio
    best = [0.584677, 0.450602, 0.567219, 2.219252, 0.608057, 0.569675, 1.518434, 0.568711]
    torch.testing.assert_close(awq.factor(see(ROWS), [WAVES], affine), torch.tensor(best), rtol=1e-5, atol=0)


def test_awq_takes_the_callers_loss_and_duo_scales() -> None:
    seen = see(ROWS)

    def prefers_large(rounded: Sequence[Tensor]) -> float:
        return -float((rounded[0] - WAVES).square().sum())

    found = awq.errors(seen, [WAVES], affine, loss=prefers_large)
    worst = min(found, key=lambda ratio: found[ratio])
    assert torch.equal(awq.factor(seen, [WAVES], affine, loss=prefers_large), awq.candidate(seen, [WAVES], worst))
    magnitude = torch.cat([part / (part.amax(1, keepdim=True) + 1e-6) for part in WAVES.abs().split(4, 1)], 1).mean(0)
    raw = seen.need("mean_abs", "test") ** 0.25 / (magnitude**0.75 + 1e-4)
    torch.testing.assert_close(awq.candidate(seen, [WAVES], 0.25, 4), raw / (raw.amax() * raw.amin()).sqrt())


FACTORS: dict[str, Callable[[Seen, list[Tensor]], Tensor]] = {
    "smoothquant": smoothquant.factor,
    "awq": lambda seen, weights: awq.factor(seen, weights, lambda w: dequantize_weight(*nearest.round_weight(w, 4, 16), 16)),
    "duo": lambda seen, weights: awq.candidate(seen, weights, 0.5, 16),
    "power": lambda seen, weights: power.power(seen),
    "logarithmic": lambda seen, weights: power.logarithmic(seen),
    "fireq": lambda seen, weights: fireq.column_factor(torch.cat(weights), 0.0096),
    "fireq max": lambda seen, weights: fireq.column_factor(torch.cat(weights), 0.015, "max"),
}


def calibrated(seed: int = 0, dead: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Rows [64, 32] float64 of a norm and the two weights that read them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(64, 32, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2.5, 32)
    if dead:
        rows[:, 5] = 0
    return rows, [torch.randn(n, 32, generator=generator, dtype=torch.float64) for n in (8, 12)]


@pytest.mark.parametrize("name", FACTORS)
def test_a_migration_through_a_norm_keeps_the_function(name: str) -> None:
    rows, weights = calibrated()
    factor = FACTORS[name](see(rows), weights).to(torch.float64)
    gamma, beta = (torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    new_gamma, new_beta = factors.divide_norm(gamma, beta, factor)
    for weight in weights:
        before = layer_norm(rows, (32,), gamma, beta) @ weight.T
        after = layer_norm(rows, (32,), new_gamma, new_beta) @ (weight * factor).T
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FACTORS)
def test_dead_inputs_and_wide_ranges_stay_within_the_limits(name: str) -> None:
    rows, weights = calibrated(dead=True)
    weights[0][:, 7], weights[1][:, 7] = 0, 0
    factor = FACTORS[name](see(rows * 1e6), weights)
    assert factor.shape == (32,)
    assert factor.dtype == torch.float32
    assert ((factor >= 1e-4) & (factor <= 1e4)).all()
    if "fireq" not in name:
        assert factor[5] == 1
    assert torch.equal(factor, FACTORS[name](see(rows * 1e6), weights))


def test_the_logarithm_leaves_ranges_of_log2_of_two_more() -> None:
    seen = see(calibrated()[0])
    absmax = seen.need("absmax", "test")
    torch.testing.assert_close(absmax / power.logarithmic(seen), torch.log2(2 + absmax))


def test_all_channels_have_one_range_with_exponent_one() -> None:
    seen = see(calibrated()[0][:, 8:])
    ranges = seen.need("absmax", "test") / power.power(seen, 1.0)
    assert (ranges.amax() - ranges.amin()) < 1e-3 * ranges.amax()


def test_a_factor_of_values_is_exact_under_grouped_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    value, output = torch.randn(2 * 4, 16, generator=generator).double(), torch.randn(16, 6 * 4, generator=generator).double()
    shared, of_values = factors.share_heads(torch.rand(24, generator=generator).double() + 0.5, 2, 6)
    x = torch.randn(5, 16, generator=generator).double()
    mix = torch.randn(6, 5, 5, generator=generator).double()

    def attend(value: Tensor, output: Tensor) -> Tensor:
        heads = (x @ value.T).unflatten(1, (2, 4)).transpose(0, 1).repeat_interleave(3, 0)
        attended: Tensor = (mix @ heads).transpose(0, 1).flatten(1) @ output.T
        return attended

    divided, _ = factors.divide_norm(value, None, of_values)
    torch.testing.assert_close(attend(divided, output * shared), attend(value, output), rtol=1e-12, atol=1e-12)
    with pytest.raises(CalibrationError, match="do not divide"):
        factors.share_heads(torch.ones(24), 4, 6)


def test_bad_arguments_are_named() -> None:
    seen = see(X)
    with pytest.raises(CalibrationError, match=r"α lies in 0 .. 1, not at 1.5"):
        smoothquant.factor(seen, [W], 1.5)
    with pytest.raises(CalibrationError, match="weights of one K"):
        smoothquant.factor(seen, [W, torch.ones(2, 3)])
    with pytest.raises(CalibrationError, match="no least error"):
        smoothquant_plus.search(lambda alpha: float("nan"))
