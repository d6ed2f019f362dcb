"""Clipping threshold by KL divergence on a histogram, the way that TensorRT describes it.

For every number i of kept magnitude bins, from the number of levels L to all: P is the first i bins with everything beyond
added to the last; Q is the first i bins merged evenly into L, each merged count spread over its bins that are not empty.
The i with the least KL(P, Q) wins; ties keep the first. Unconfirmed: published descriptions differ in how they smooth bins
that Q leaves empty; here such an i is out (its divergence is infinite), and the threshold is the upper edge of bin i - 1,
at most the greatest magnitude.
"""

import torch
from torch import Tensor

from fxquant.calibration.observers.histogram import Histogram
from fxquant.calibration.searches.metric import Choice
from fxquant.calibration.searches.objectives import kl_divergence
from fxquant.calibration.searches.ranges import from_extent
from fxquant.errors import CalibrationError
from fxquant.formats.uniform import Uniform


def kl(histogram: Histogram, format: Uniform) -> Choice:
    """The extent of the data clipped to ± the threshold.

    Magnitudes have 2^(b-1) levels, or 2^b where affine codes meet data of one sign.
    """
    samples = histogram.samples()
    low, high = samples.extent()
    one_sided = (low >= 0) | (high <= 0)
    half = 1 << (format.bits - 1)
    threshold = kl_threshold(histogram, half)
    if not format.is_symmetric and bool(one_sided.any()):
        threshold = torch.where(one_sided, kl_threshold(histogram, 2 * half), threshold)
    return from_extent(samples, format, torch.maximum(low, -threshold), torch.minimum(high, threshold))


def kl_threshold(histogram: Histogram, levels: int) -> Tensor:
    """float32 [B, 1].

    Raises:
        CalibrationError: the histogram has fewer magnitude bins than levels.
    """
    counts = histogram.magnitudes.to(torch.float64)
    if counts.shape[1] < levels:
        need = f"give the histogram at least {2 * levels} bins"
        raise CalibrationError(f"{histogram.site}: {counts.shape[1]} magnitude bins are fewer than {levels} levels; {need}")
    best = torch.full((len(counts),), torch.inf, dtype=torch.float64)
    kept = torch.full((len(counts),), counts.shape[1], dtype=torch.int64)
    for bins in range(levels, counts.shape[1] + 1):
        divergence = _divergence(counts, bins, levels)
        better = divergence < best
        best, kept = torch.where(better, divergence, best), torch.where(better, bins, kept)
    low, high = histogram.samples().extent()
    return torch.minimum(kept[:, None] * histogram.width, torch.maximum(-low, high))


def _divergence(counts: Tensor, bins: int, levels: int) -> Tensor:
    """KL(P, Q) of every block, float64 [B]."""
    inside = counts[:, :bins]
    reference = inside.clone()
    reference[:, -1] += counts[:, bins:].sum(1)
    group = torch.arange(bins) * levels // bins
    filled = (inside > 0).to(torch.float64)
    merged = torch.zeros(len(counts), levels, dtype=torch.float64)
    number = merged.index_add(1, group, filled).clamp_min(1)
    mean = merged.index_add(1, group, inside) / number
    return kl_divergence(reference, mean[:, group] * filled)
