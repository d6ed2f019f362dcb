"""AdaRound: worked example, schedule, never worse on the rows, early stop, progress."""

import math

import pytest
import torch
from torch import Tensor

from fxquant.calibration.rounding import adaround, gptq, nearest
from fxquant.calibration.rounding.grid import encode, row_errors
from fxquant.calibration.seen import Seen, see
from fxquant.errors import CalibrationError
from fxquant.reference import dequantize_weight

QUICK = adaround.Options(iterations=600)


def site(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [8, 32] and correlated rows [256, 32]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(32) + torch.randn(32, 32, generator=generator) / 32**0.5
    return torch.randn(8, 32, generator=generator), torch.randn(256, 32, generator=generator) @ mixing


def test_the_worked_example_of_one_weight() -> None:
    logit = adaround.fraction_to_logit(torch.tensor([0.3], dtype=torch.float64))
    assert float(logit) == pytest.approx(-math.log(2))
    step = adaround.soft_step(logit)
    assert float(step) == pytest.approx(0.3)
    assert float(adaround.penalty(step, 2.0)) == pytest.approx(0.84)
    assert 1 - float(adaround.penalty(step, 20.0)) == pytest.approx(1.1e-8, rel=0.01)


def test_every_fraction_is_found_again() -> None:
    fraction = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(adaround.soft_step(adaround.fraction_to_logit(fraction)), fraction)


def test_the_penalty_starts_after_a_fifth_and_softens() -> None:
    options = adaround.Options(iterations=100)
    assert adaround.beta_at(19, options) is None
    assert adaround.beta_at(20, options) == 20
    assert adaround.beta_at(60, options) == 11
    assert adaround.beta_at(100, options) == 2


@pytest.mark.parametrize("group", [0, 16])
def test_learned_codes_are_neighbours_and_better_than_nearest_ones(group: int) -> None:
    weight, rows = site()
    seen = see(rows)
    hessian = seen.need("hessian", "test")
    codes, scale = adaround.round_weight(weight, 3, group, seen, QUICK)
    near, steps = nearest.round_weight(weight, 3, group)
    assert torch.equal(scale, steps)
    learned, plain = (row_errors(weight, dequantize_weight(each, scale, group), hessian) for each in (codes, near))
    assert (learned <= plain).all()
    assert learned.sum() < 0.85 * plain.sum()
    assert (dequantize_weight(codes, scale, group) - weight).abs().amax() < scale.amax() * 1.001
    assert torch.equal(codes, adaround.round_weight(weight, 3, group, seen, QUICK)[0])


def test_the_goal_can_be_the_float_models_output() -> None:
    weight, rows = site()
    noisy = rows + 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
    goal = rows @ weight.T

    def loss(seen: Seen) -> float:
        return float((noisy @ dequantize_weight(*adaround.round_weight(weight, 3, 0, seen, QUICK), 0).T - goal).square().sum())

    assert loss(see(noisy, rows)) < loss(see(noisy))


def test_it_stops_where_everything_is_decided_and_tells_its_progress() -> None:
    told: list[int] = []
    weight, rows = site()
    options = adaround.Options(
        iterations=3000, rate=0.1, weight=100.0, check_every=50, progress=lambda i, error: told.append(i)
    )
    adaround.round_weight(weight, 3, 0, see(rows), options)
    assert told == list(range(0, told[-1] + 1, 50))
    assert told[-1] < 2950


def test_a_weight_on_the_grid_stays() -> None:
    weight = torch.tensor([[-7.0, 3, 0, 1], [7, 7, -2, 5]])
    assert torch.equal(adaround.round_weight(weight, 4, 0, see(torch.eye(4)), QUICK)[0], weight.to(torch.int8))


@pytest.mark.parametrize("rows", [torch.ones(3, 31), torch.ones(0, 32), torch.ones(32)])
def test_rows_that_do_not_fit_are_refused(rows: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"adaround wants rows \[R, 32\]"):
        adaround.round_weight(site()[0], 4, 0, Seen(1, rows=rows))


def test_learning_can_start_from_the_scales_of_another_method() -> None:
    weight, rows = site()
    seen = see(rows)

    def scale_of(weight: Tensor, bits: int, group: int) -> Tensor:
        return nearest.round_weight(weight, bits, group)[1] * 0.8

    hessian = seen.need("hessian", "test")
    expected = nearest.round_weight(weight, 3)[1] * 0.8
    options = adaround.Options(iterations=600, scale_of=scale_of)
    codes, scale = adaround.round_weight(weight, 3, 0, seen, options)
    assert torch.equal(scale, expected)
    plain = dequantize_weight(encode(weight, expected, 3, 0), expected, 0)
    assert row_errors(weight, dequantize_weight(codes, scale, 0), hessian).sum() < row_errors(weight, plain, hessian).sum()
    by_columns = gptq.round_weight(weight, 3, 0, seen, gptq.Options(scale_of=scale_of))
    assert torch.equal(by_columns[1], expected)
