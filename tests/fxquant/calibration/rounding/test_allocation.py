"""Bits under a budget: the worked example, brute force, and the outlier score."""

import itertools

import pytest
import torch

from fxquant.calibration.rounding.allocation import allocate, outlier_score
from fxquant.errors import CalibrationError

SIZES = (4, 1, 2)
LOSS = ({2: 9, 4: 0.6, 8: 0.002}, {2: 6, 4: 0.4, 8: 0.001}, {2: 20, 4: 1.2, 8: 0.004})


@pytest.mark.parametrize(
    ("budget", "bits", "loss"), [(4, (4, 4, 4), 2.2), (4.6, (4, 8, 4), 1.801), (5, (4, 8, 4), 1.801), (8, (8, 8, 8), 0.007)]
)
def test_the_worked_example(budget: float, bits: tuple[int, ...], loss: float) -> None:
    assert allocate(LOSS, SIZES, budget) == bits
    assert sum(each[width] for each, width in zip(LOSS, bits, strict=True)) == pytest.approx(loss)


def test_it_is_the_optimum_of_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 9, (5,), generator=generator).tolist()
        loss = [
            {b: float(x) * 4.0**-b for b, x in zip((2, 3, 4, 8), torch.rand(4, generator=generator) + 0.1, strict=True)}
            for _ in sizes
        ]
        budget = 2.5 + 3 * float(torch.rand(1, generator=generator))
        fits = [
            bits
            for bits in itertools.product((2, 3, 4, 8), repeat=5)
            if sum(n * b for n, b in zip(sizes, bits, strict=True)) <= budget * sum(sizes)
        ]
        found = allocate(loss, sizes, budget)
        assert found in fits

        def total(bits: tuple[int, ...], loss: list[dict[int, float]] = loss) -> float:
            return sum(each[b] for each, b in zip(loss, bits, strict=True))

        assert total(found) == pytest.approx(min(map(total, fits)))


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"1\.5 bits a weight are too few; the narrowest choice of every linear takes 2"):
        allocate(LOSS, SIZES, 1.5)


def test_an_outlier_raises_the_score() -> None:
    weight = torch.ones(10, 4)
    assert outlier_score(weight) == 1
    weight[3, 2], weight[:, 0] = 11, 0
    assert outlier_score(weight) == pytest.approx(5.5)
    assert outlier_score(torch.zeros(3, 3)) == 0
