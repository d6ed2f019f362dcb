"""Objectives against their formulas, and KL thresholds against a plain loop."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.calibration.observers import Gram, Histogram
from fxquant.calibration.searches import kl
from fxquant.calibration.searches.kl import kl_threshold
from fxquant.calibration.searches.objectives import (
    cosine,
    hessian_weighted,
    kl_divergence,
    output_mse,
    second_order,
    squared_error,
)
from fxquant.errors import CalibrationError
from fxquant.formats import Uniform
from fxquant.granularity import PerChannel

OUTPUT, APPROXIMATION = torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[1.5, 2.0], [2.0, -4.0]])


def test_output_errors() -> None:
    assert output_mse(OUTPUT, APPROXIMATION).tolist() == [[0.25, 0], [1, 0]]
    assert hessian_weighted(OUTPUT, APPROXIMATION, torch.tensor([[2.0, 9.0], [0.5, 9.0]])).tolist() == [[1, 0], [0.25, 0]]
    with pytest.raises(CalibrationError, match="needs the gradient at the output"):
        hessian_weighted(OUTPUT, APPROXIMATION, None)


def test_cosine_is_of_rows() -> None:
    expected = [1 - 5.5 / math.sqrt(5 * 6.25), 1 - 22 / math.sqrt(25 * 20)]
    assert cosine(OUTPUT, APPROXIMATION).shape == (2, 1)
    assert cosine(OUTPUT, APPROXIMATION)[:, 0].tolist() == pytest.approx(expected)


def test_squared_error_weighs_by_counts() -> None:
    assert squared_error(OUTPUT, APPROXIMATION).tolist() == [0.25, 1]
    assert squared_error(OUTPUT, APPROXIMATION, torch.tensor([[4, 1], [3, 7]])).tolist() == [1, 3]


def test_the_second_order_error_is_that_of_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, error = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    gram = Gram("fc1", dtype=torch.float64)
    gram.observe(rows)
    expected = (rows.double() @ error.double().T).square().sum(0)
    assert torch.allclose(second_order(error, gram.gram), expected, rtol=1e-10)


def test_kl_divergence() -> None:
    p, q = torch.tensor([[2.0, 2.0], [4.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 3.0], [1.0, 1.0], [5.0, 0.0]])
    expected = [0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), math.log(2), math.inf]
    assert kl_divergence(p, q).tolist() == pytest.approx(expected)


def plain_threshold(magnitudes: list[int], levels: int) -> int:
    """The number of bins that the module's docstring describes."""
    best, kept = math.inf, 0
    for bins in range(levels, len(magnitudes) + 1):
        reference = list(map(float, magnitudes[:bins]))
        reference[-1] += sum(magnitudes[bins:])
        approximation = [0.0] * bins
        for level in range(levels):
            group = [j for j in range(bins) if j * levels // bins == level]
            filled = [j for j in group if magnitudes[j]]
            for j in filled:
                approximation[j] = sum(magnitudes[i] for i in group) / len(filled)
        p, q = np.array(reference) / sum(reference), np.array(approximation) / max(sum(approximation), 1e-300)
        parts = [math.inf if q[j] == 0 else p[j] * math.log(p[j] / q[j]) for j in range(bins) if p[j] > 0]
        if sum(parts) < best - 1e-15:
            best, kept = sum(parts), bins
    return kept


@pytest.mark.parametrize("levels", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_that_of_a_plain_loop(levels: int, seed: int) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(seed)).abs()
    x[0] = 9
    histogram = Histogram("fc1", bins=128)
    histogram.observe(x)
    bins = plain_threshold(histogram.magnitudes[0].tolist(), levels)
    assert float(kl_threshold(histogram, levels)) == pytest.approx(min(bins * float(histogram.width), 9))
    assert bins < 64


def outliers(sign: float) -> Tensor:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x = x if sign == 0 else x.abs() * sign
    x[7] = 50 if sign >= 0 else -50
    return x


def test_lone_outliers_are_clipped_away() -> None:
    histogram = Histogram("fc1")
    histogram.observe(outliers(0))
    choice = kl(histogram, Uniform(8, is_symmetric=True))
    assert 2 < 127 * float(choice.qparams["scale"]) < 10


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_data_of_one_sign_have_all_levels_on_their_side(sign: float) -> None:
    histogram = Histogram("fc1")
    histogram.observe(outliers(sign))
    choice = kl(histogram, Uniform(6))
    assert float(choice.qparams["zero_point"]) == (0 if sign > 0 else 63)
    assert 63 * float(choice.qparams["scale"]) < 10


def test_only_affine_codes_of_one_sign_search_with_all_levels() -> None:
    """2^b magnitudes for them, 2^(b-1) for a block of both signs beside them and for symmetric codes."""
    histogram = Histogram("fc1", PerChannel(-1), bins=256)
    histogram.observe(torch.stack([outliers(1), outliers(-1), outliers(0)], dim=1))
    half, whole = kl_threshold(histogram, 8), kl_threshold(histogram, 16)
    assert (half != whole).all()
    affine = kl(histogram, Uniform(4)).qparams["scale"].reshape(-1)
    wanted = torch.stack([whole[0, 0], whole[1, 0], 2 * half[2, 0]]) / 15
    torch.testing.assert_close(affine, wanted)
    symmetric = kl(histogram, Uniform(4, is_symmetric=True)).qparams["scale"].reshape(-1)
    torch.testing.assert_close(symmetric, half[:, 0] / 7)


def test_a_histogram_with_too_few_bins_is_refused() -> None:
    histogram = Histogram("fc1", bins=64)
    histogram.observe(torch.ones(4))
    with pytest.raises(CalibrationError, match=r"^fc1: 32 magnitude bins are fewer than 128 levels.* at least 256 bins"):
        kl_threshold(histogram, 128)


def test_blocks_have_thresholds_of_their_own() -> None:
    both, first = Histogram("fc1", PerChannel(-1), bins=256), Histogram("fc1", bins=256)
    x = torch.stack([outliers(0), 5 * outliers(0).flip(0).tanh()], dim=1)
    both.observe(x)
    first.observe(x[:, 0])
    assert kl_threshold(both, 16)[0] == kl_threshold(first, 16)[0]
    assert kl_threshold(both, 16)[0] != kl_threshold(both, 16)[1]
