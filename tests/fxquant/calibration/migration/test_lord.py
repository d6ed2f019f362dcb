"""Low rank and dual clipping: the error is what is left out, the optimum, ranks of the publications, min-max as the limit."""

import math

import pytest
import torch
from torch import Tensor

from fxquant.calibration.migration import lord, repquant
from fxquant.calibration.seen import Seen, see
from fxquant.errors import CalibrationError
from fxquant.formats import Uniform


def site() -> tuple[Tensor, Tensor, Tensor]:
    """Weight [10, 12], bias [10], rows [50, 12] of unlike channels with a mean, float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 12, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 12, dtype=torch.float64) + 3
    return torch.randn(10, 12, generator=generator).double(), torch.randn(10, generator=generator).double(), rows


def loss(found: lord.LowRank, weight: Tensor, bias: Tensor, rows: Tensor) -> float:
    """Mean over tokens of ‖y - y'‖²."""
    new = rows @ found.down.T @ found.up.T + found.bias
    return float((new - rows @ weight.T - bias).square().sum(1).mean())


@pytest.mark.parametrize("rank", [1, 3, 9, 10])
def test_the_error_is_the_sum_of_the_eigenvalues_left_out(rank: int) -> None:
    weight, bias, rows = site()
    found = lord.factorize(weight, bias, rank, see(rows))
    assert found.down.shape == (rank, 12)
    assert found.up.shape == (10, rank)
    assert loss(found, weight, bias, rows) == pytest.approx(found.error, rel=1e-9, abs=1e-9)
    eigenvalues = torch.linalg.eigvalsh((rows @ weight.T).T.cov(correction=0))
    assert found.error == pytest.approx(float(eigenvalues[: 10 - rank].sum()), rel=1e-9, abs=1e-9)


def test_it_is_better_than_the_weights_own_decomposition_and_than_no_mean() -> None:
    weight, bias, rows = site()
    seen = see(rows)
    best = loss(lord.factorize(weight, bias, 3, seen), weight, bias, rows)
    assert best < loss(lord.truncate(weight, bias, 3), weight, bias, rows)
    without = lord.factorize(weight, bias, 3, Seen(seen.tokens, hessian=seen.hessian))
    assert torch.equal(without.bias, bias)
    assert best < loss(without, weight, bias, rows) == pytest.approx(without.error)


def test_truncation_is_the_weights_best_and_balanced() -> None:
    weight, bias, _ = site()
    found = lord.truncate(weight, None, 4)
    assert float((found.up @ found.down - weight).square().sum()) == pytest.approx(found.error)
    torch.testing.assert_close(found.up.T @ found.up, found.down @ found.down.T)
    assert lord.truncate(weight, bias, 10).error == pytest.approx(0, abs=1e-12)


def test_the_ranks_of_the_publications() -> None:
    assert lord.break_even(3072, 768) == pytest.approx(614.4)
    assert lord.break_even(11008, 4096) == pytest.approx(2985.2, abs=0.05)
    assert lord.pela_rank(768, 768, 2) == 192
    assert [lord.pela_rank(3072, 768, ratio) for ratio in (2, 3)] == [307, 204]


@pytest.mark.parametrize("rank", [0, 11])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    with pytest.raises(CalibrationError, match=r"ranks 1 .. 10"):
        lord.truncate(site()[0], None, rank)


def skewed() -> tuple[Tensor, Tensor]:
    """Rows [300, 8] with rare peaks on one side, and a weight [16, 8]."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 8, generator=generator)
    rows[::50] += 12 * torch.rand(6, 8, generator=generator)
    return rows, torch.randn(16, 8, generator=generator)


def test_keeping_everything_is_min_max_bit_for_bit() -> None:
    rows, _ = skewed()
    low, high = rows.amin(0), rows.amax(0)
    whole = torch.full((8,), math.inf)
    scale, zero_point = repquant.qparams(low, high, repquant.Clip(whole, whole), 4)
    torch.testing.assert_close(scale, (high - low) / 15, rtol=1e-6, atol=0)
    assert torch.equal(zero_point, torch.round(-low / scale))
    blocks = {"scale": scale[:, None], "zero_point": zero_point[:, None]}
    assert torch.equal(repquant.fake_quant(rows, scale, zero_point, 4), Uniform(4).fake_quant(rows.T, blocks).T)


def test_the_two_ends_are_clipped_apart() -> None:
    clip = repquant.Clip(torch.tensor([0.0]), torch.tensor([math.inf]))
    scale, zero_point = repquant.qparams(torch.tensor([-3.0]), torch.tensor([9.0]), clip, 4)
    assert float(scale) == pytest.approx(0.5)
    assert float(zero_point) == 6


def test_learned_clipping_lowers_the_error_of_the_output_and_moves_the_ends_apart() -> None:
    rows, weight = skewed()
    clip = repquant.learn(rows, weight, 4, iterations=200)
    whole = repquant.Clip(torch.full((8,), math.inf), torch.full((8,), math.inf))
    low, high = rows.amin(0).clamp_max(0), rows.amax(0).clamp_min(0)

    def error(clip: repquant.Clip) -> float:
        return float(((repquant.fake_quant(rows, *repquant.qparams(low, high, clip, 4), 4) - rows) @ weight.T).square().mean())

    assert error(clip) < 0.95 * error(whole)
    assert ((clip.upper - clip.lower).abs() > 0.1).all()
    again = repquant.learn(rows, weight, 4, iterations=200)
    assert torch.equal(again.upper, clip.upper)


def test_a_clip_logit_without_clipped_values_feels_only_the_rounding() -> None:
    low, high = torch.tensor([-2.0]), torch.tensor([2.0])
    upper = torch.tensor([0.0], requires_grad=True)
    clip = repquant.Clip(upper, torch.tensor([0.0]))
    scale, zero_point = repquant.qparams(low, high, clip, 4)
    x = torch.tensor([[0.5], [-0.7], [0.8]])
    value = repquant.fake_quant(x, scale, zero_point, 4)
    (grad,) = torch.autograd.grad(value.sum(), upper)
    codes = torch.round(x / scale.detach()) + torch.round(zero_point.detach())
    residual = (codes - torch.round(zero_point.detach())) - x / scale.detach()  # rne(v) - v
    through_scale = float(residual.sum()) * float(torch.autograd.grad(_scale(upper, low, high), upper)[0])
    assert float(grad) == pytest.approx(through_scale, abs=1e-5)


def _scale(upper: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return repquant.qparams(low, high, repquant.Clip(upper, torch.tensor([0.0])), 4)[0].sum()
