"""Searches over the range that a format is fitted to: min-max, percentile, MSE-selected percentile, OMSE, two-sided MSE grid.

vit-quantizers section 2, confirmed but for ``mse_grid``, which is ours. A format may widen a range (uniform formats always
have zero among their levels), so the ends are those of the data and the format decides. Each takes a metric to judge by
instead of the mean squared error of the samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.searches.metric import Candidates, Choice, Metric, TensorMetric, choose, range_candidates
from fxquant.formats.base import Format

# RepQ-ViT: activations, weights, and the scale of log-√2 codes; I&S-ViT: activations.
REPQ_FRACTIONS = (0.999, 0.9999, 0.99999)
# I&S-ViT: weights.
IAS_WEIGHT_FRACTIONS = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)
# FQ-ViT's percentile.
FQ_FRACTION = 0.99999
OMSE_STEPS = 90


def min_max(samples: Samples, format: Format, *, allow_flat: bool = True) -> Choice:
    """The whole extent.

    Raises:
        CalibrationError: all values of a block are equal and ``allow_flat`` is False.
    """
    low, high = samples.extent(allow_flat=allow_flat)
    return from_extent(samples, format, low, high)


def from_extent(samples: Samples, format: Format, low: Tensor, high: Tensor) -> Choice:
    """A range that an observer found (such as ``EmaExtent``), [B, 1]; the samples only tell its loss."""
    return choose(TensorMetric(samples), [range_candidates(format, low[None], high[None])])


def percentile(samples: Samples, format: Format, fraction: float = FQ_FRACTION) -> Choice:
    """The quantiles 1 - fraction and fraction."""
    return mse_percentile(samples, format, (fraction,))


def mse_percentile(
    samples: Samples, format: Format, fractions: Sequence[float] = REPQ_FRACTIONS, *, metric: Metric | None = None
) -> Choice:
    """Of the quantiles (1 - p, p) those with the least mean squared error; ties keep the first."""
    low = torch.stack([samples.quantile(1 - fraction) for fraction in fractions])
    high = torch.stack([samples.quantile(fraction) for fraction in fractions])
    return choose(metric or TensorMetric(samples), [range_candidates(format, low, high)])


def omse(samples: Samples, format: Format, *, metric: Metric | None = None) -> Choice:
    """FQ-ViT: both ends shrunk by 1 - 0.01 i, i = 0 .. 89, the least mean squared error; ties keep the first (the widest)."""
    factors = 1 - 0.01 * torch.arange(OMSE_STEPS, dtype=torch.float64)
    return choose(metric or TensorMetric(samples), [_shrunk(samples, format, factors, factors)])


def mse_grid(samples: Samples, format: Format, *, steps: int = 16, least: float = 0.3, metric: Metric | None = None) -> Choice:
    """Both ends shrunk independently, by ``steps`` factors from 1 down to ``least`` each: steps² candidates, the widest first.

    For skewed data, where one end has the outliers.
    """
    factors = torch.linspace(1, least, steps, dtype=torch.float64)
    pairs = torch.cartesian_prod(factors, factors)
    return choose(metric or TensorMetric(samples), [_shrunk(samples, format, pairs[:, 0], pairs[:, 1])])


def _shrunk(samples: Samples, format: Format, low: Tensor, high: Tensor) -> Candidates:
    ends = samples.extent()
    scaled = [(end[None] * factor[:, None, None]).to(torch.float32) for end, factor in zip(ends, (low, high), strict=True)]
    return range_candidates(format, *scaled)
