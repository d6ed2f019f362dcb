"""GPTQ and GPTAQ: worked examples, never worse than nearest, the sign of GPTAQ's term, hard Hessians."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fxquant.calibration.rounding import awq, gptaq, gptq, hessian_weighted, mse, nearest
from fxquant.calibration.rounding.grid import absmax_scale, encode, row_errors
from fxquant.calibration.seen import Seen, see
from fxquant.errors import CalibrationError
from fxquant.reference import dequantize_weight

W = torch.tensor([[0.9, -1.4, 0.6], [0.3, 0.8, -1.1]])
X = torch.tensor([[2.0, 1, 0], [0, 1, 1], [1, 0, 2], [1, 1, 1]])
NOISE = torch.tensor([[0.2, -0.1, 0.1], [-0.1, 0, 0.2], [0.1, 0.1, -0.2], [0, 0.2, 0.1]])
FACTOR = torch.tensor([[0.834191, -0.701292, -0.181816], [0, 0.915, -0.302479], [0, 0, 0.57496]], dtype=torch.float64)
P = torch.tensor([[0, -0.026604, -0.004428], [0, 0, -0.064463], [0, 0, 0]], dtype=torch.float64)
P_DAMPED = torch.tensor([[0, -0.0262, -0.0012], [0, 0, -0.0655], [0, 0, 0]], dtype=torch.float64)


def halves(weight: Tensor, bits: int, group: int) -> Tensor:
    """The worked example's scale."""
    return torch.full((len(weight),), 0.5)


def correlated(rows: int, k: int, seed: int) -> Tensor:
    """Rows [n, K] whose channels differ in size and hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    drawn: Tensor = torch.randn(rows, k, generator=generator) @ mixing * (1 + 10 * torch.rand(k, generator=generator) ** 4)
    return drawn


def test_the_worked_example_of_the_factor() -> None:
    seen = see(X)
    assert seen.hessian is not None
    assert torch.equal(seen.hessian, torch.tensor([[3, 1.5, 1.5], [1.5, 1.5, 1], [1.5, 1, 3]], dtype=torch.float64))
    torch.testing.assert_close(gptq.inverse_factor(seen.hessian, 0.01), FACTOR, atol=1e-5, rtol=0)


def test_the_worked_example_of_gptq_is_the_optimum_of_brute_force() -> None:
    seen = see(X)
    hessian = seen.need("hessian", "test")
    codes, scale = gptq.round_weight(W, 3, 0, seen, gptq.Options(scale_of=halves))
    assert (codes * 0.5).tolist() == [[1, -1.5, 0.5], [0.5, 0.5, -1]]
    squares = 4 * row_errors(W, dequantize_weight(codes, scale, 0), hessian)
    assert float(squares.sum()) == pytest.approx(0.28)
    assert float(4 * row_errors(W, encode(W, scale, 3, 0) * 0.5, hessian).sum()) == pytest.approx(0.93)
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=3))) * 0.5
    best = [4 * row_errors(row.expand(len(every), 3), every, hessian).amin() for row in W]
    assert float(sum(best)) == pytest.approx(0.28)


def test_the_worked_example_of_gptaqs_matrix() -> None:
    seen = see(X + NOISE, X)
    cross = seen.need("cross", "test")
    torch.testing.assert_close(cross, (2 / 4 * -NOISE.T @ (X + NOISE)).to(torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(gptq.push_matrix(FACTOR, cross), P, atol=1e-6, rtol=0)
    damped = gptq.inverse_factor(seen.need("hessian", "test"), 0.01)
    torch.testing.assert_close(gptq.push_matrix(damped, cross), P_DAMPED, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 16, 24])
@pytest.mark.parametrize("options", [gptq.Options(), gptq.Options(act_order=True), gptq.Options(static_groups=True, block=7)])
def test_gptq_is_never_worse_than_nearest(bits: int, group: int, options: gptq.Options) -> None:
    for seed in range(2):
        seen = see(correlated(200, 64, seed))
        weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(seed))
        hessian = seen.need("hessian", "test")
        codes, scale = gptq.round_weight(weight, bits, group, seen, options)
        errors = row_errors(weight, dequantize_weight(codes, scale, group), hessian)
        plain = row_errors(weight, dequantize_weight(*nearest.round_weight(weight, bits, group), group), hessian)
        assert (errors <= plain).all()
        assert errors.sum() < (1.0 if bits == 2 else 0.8) * plain.sum()
        assert int(codes.abs().amax()) <= 2 ** (bits - 1) - 1
        again = gptq.round_weight(weight, bits, group, seen, options)
        assert torch.equal(codes, again[0])
        assert torch.equal(scale, again[1])


def test_the_block_does_not_change_the_result() -> None:
    seen, weight = see(correlated(200, 64, 0)), torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    codes = [gptq.round_weight(weight, 4, 0, seen, gptq.Options(block=block))[0] for block in (1, 5, 64, 128)]
    assert all(torch.equal(each, codes[0]) for each in codes)


def test_static_scales_are_those_of_the_weight_as_it_came() -> None:
    seen, weight = see(correlated(200, 64, 0)), torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    for options in (gptq.Options(act_order=True), gptq.Options(static_groups=True)):
        assert torch.equal(gptq.round_weight(weight, 4, 16, seen, options)[1], absmax_scale(weight, 4, 16))
    assert not torch.equal(gptq.round_weight(weight, 4, 16, seen)[1], absmax_scale(weight, 4, 16))


def test_uncorrelated_inputs_give_nearest_codes() -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    seen = Seen(1, hessian=torch.diag(torch.rand(32, dtype=torch.float64) + 0.1))
    assert torch.equal(gptq.round_weight(weight, 4, 0, seen)[0], nearest.round_weight(weight, 4)[0])


def test_a_dead_input_gets_weight_zero_and_does_not_widen_the_scale() -> None:
    rows, weight = correlated(100, 16, 0), torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    rows[:, 3], weight[:, 3] = 0, 50.0
    codes, scale = gptq.round_weight(weight, 4, 0, see(rows))
    assert (codes[:, 3] == 0).all()
    assert (scale < 1).all()


def test_fewer_rows_than_features_are_enough() -> None:
    rows, weight = correlated(8, 32, 0), torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    seen = see(rows)
    codes, scale = gptq.round_weight(weight, 4, 0, seen)
    plain = nearest.round_weight(weight, 4)
    hessian = seen.need("hessian", "test")
    assert (
        row_errors(weight, dequantize_weight(codes, scale, 0), hessian).sum()
        < row_errors(weight, dequantize_weight(*plain, 0), hessian).sum()
    )


def test_the_damping_is_raised_where_the_factor_does_not_exist() -> None:
    slightly_negative = torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64))
    factor = gptq.inverse_factor(slightly_negative, 0.01)
    added = 1 / factor[0, 0].square() - 1
    assert float(added) == pytest.approx(0.1 * 1.95 / 3)
    with pytest.raises(CalibrationError, match="not positive definite"):
        gptq.inverse_factor(-torch.eye(3, dtype=torch.float64), 0.01)


@pytest.mark.parametrize("hessian", [torch.eye(3), torch.full((16, 16), float("nan"))])
def test_a_hessian_that_does_not_fit_is_refused(hessian: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"hessian must be a finite \[16, 16\]"):
        gptq.round_weight(torch.ones(2, 16), 4, 0, Seen(1, hessian=hessian))


def test_a_missing_statistic_is_named() -> None:
    with pytest.raises(CalibrationError, match="gptaq needs the statistic 'cross'"):
        gptaq.round_weight(torch.ones(2, 16), 4, 0, Seen(1, hessian=torch.eye(16)))


def full_loss(weight: Tensor, rounded: Tensor, rows: Tensor, float_rows: Tensor) -> float:
    """‖W Fᵀ - Ŵ Xᵀ‖²."""
    return float((float_rows @ weight.T - rows @ rounded.T).square().sum())


def relative_losses(strengths: tuple[float, ...]) -> dict[float, list[float]]:
    """GPTAQ's loss relative to GPTQ's on the same Hessian: N = 16, K = 32, 256 tokens, 20 seeds, 4 bits."""
    found: dict[float, list[float]] = {strength: [] for strength in strengths}
    options = gptq.Options(keep_nearest=False)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight, rows = (torch.randn(n, 32, generator=generator) for n in (16, 256))
        noisy = rows + 0.3 * rows.std() * torch.randn(256, 32, generator=generator)
        seen = see(noisy, rows)
        base = full_loss(weight, dequantize_weight(*gptq.round_weight(weight, 4, 0, seen, options), 0), noisy, rows)
        for strength in strengths:
            rounded = dequantize_weight(*gptaq.round_weight(weight, 4, 0, seen, options, strength), 0)
            found[strength].append(full_loss(weight, rounded, noisy, rows) / base)
    return found


def test_gptaq_comes_nearer_to_the_float_output_than_gptq_and_its_sign_matters() -> None:
    published = {0.25: 0.979, 0.5: 0.959, 1.0: 0.940, -1.0: 1.159}
    for strength, ratios in relative_losses(tuple(published)).items():
        assert sum(ratios) / len(ratios) == pytest.approx(published[strength], abs=0.02), strength
        assert all((ratio < 1) == (strength > 0) for ratio in ratios)


def test_gptaq_without_strength_is_gptq() -> None:
    rows = correlated(100, 32, 0)
    seen, weight = see(rows, rows * 1.01), torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gptaq.round_weight(weight, 4, 0, see(rows, rows))[0], gptq.round_weight(weight, 4, 0, seen)[0])


SCALES: dict[str, Callable[[Seen], Callable[[Tensor, int, int], Tensor]]] = {
    "norm 2.4": lambda seen: partial(mse.choose_scale, norm=2.4),
    "mse": lambda seen: mse.choose_scale,
    "hessian_weighted": lambda seen: partial(hessian_weighted.choose_scale, seen=seen),
    "awq": lambda seen: partial(awq.choose_scale, seen=seen),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("group", [0, 16])
def test_scales_can_be_those_of_another_method(name: str, group: int) -> None:
    seen, weight = see(correlated(200, 64, 0)), torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    scale_of = SCALES[name](seen)
    codes, scale = gptq.round_weight(weight, 3, group, seen, gptq.Options(scale_of=scale_of, act_order=True))
    assert torch.equal(scale, scale_of(weight, 3, group))
    hessian = seen.need("hessian", "test")
    plain = encode(weight, scale, 3, group)
    errors = (row_errors(weight, dequantize_weight(each, scale, group), hessian).sum() for each in (codes, plain))
    assert next(errors) < next(errors)
