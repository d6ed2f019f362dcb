"""Low rank: the error is what is left out, the optimum, ranks of the publications."""

import pytest
import torch
from torch import Tensor

from fxquant.calibration.migration import lord
from fxquant.calibration.seen import Seen, see
from fxquant.errors import CalibrationError


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
