"""The base 2^(q / 37) of AdaLog codes, and after GELU the scale δ with it.

Probabilities have δ = 1 and a plain scan of q, repeated in every round of alternation. After GELU: the best 8 bases at a
first δ, each with 16 scales from the 0.9 quantile of the positive values to the greatest (both + ς); then the scales are
refined around the best 32 (``fpcs.combine_progressively``) while q stays. vit-quantizers 9.4, confirmed; the quantile is the
order statistic of rank ceil(0.9 · number) of the positive values and the first δ is just under the greatest, as in the
reference code.
"""

import torch
from torch import Tensor

from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.searches.fpcs import LOG_PROGRESS, best_few, combine_progressively
from fxquant.calibration.searches.metric import Candidates, Choice, Metric, choose
from fxquant.calibration.searches.scan import whole_numbers
from fxquant.formats.adalog import BASES, AdaLog

SCALES = 16
BEST_BASES = 8
# The reference code starts with the last but one of 128 scales.
FIRST_SHARE = 126 / 127


def adalog_base(metric: Metric, format: AdaLog, scale: Tensor, bases: range = BASES) -> Choice:
    """q of every block for a scale [B, 1] (1 for probabilities); ties keep the first."""
    return choose(metric, [_with_bases(format, scale, bases)])


def adalog_scale_and_base(metric: Metric, samples: Samples, format: AdaLog, *, first: Tensor | None = None) -> Choice:
    """(δ, q) of shifted codes; ``first`` [B, 1] is the δ that bases are tried at, such as that of the round before."""
    low, high = positive_quantile(samples, 0.9) + format.shift, samples.extent()[1].clamp_min(0) + format.shift
    bases = _with_bases(format, low + FIRST_SHARE * (high - low) if first is None else first, BASES)
    few = best_few(bases, metric.losses(bases), BEST_BASES)["base"]
    scales = low + torch.linspace(0, 1, SCALES)[:, None, None] * (high - low)
    start = {"scale": scales.repeat(len(few), 1, 1), "base": few.repeat_interleave(SCALES, 0)}
    return combine_progressively(metric, Candidates(format, start), scales[1] - scales[0], LOG_PROGRESS)


def positive_quantile(samples: Samples, fraction: float) -> Tensor:
    """The order statistic of rank ceil(fraction · number) among the positive values, float32 [B, 1]; 0 where there are none."""
    counts = torch.ones_like(samples.values, dtype=torch.int64) if samples.counts is None else samples.counts
    total = counts.sum(1, keepdim=True)
    positive = (counts * (samples.values > 0)).sum(1, keepdim=True)
    rank = total - positive + torch.ceil(fraction * positive.to(torch.float64)).to(torch.int64) - 1
    return torch.where(positive > 0, samples.at_rank(rank.clamp(min=0)), 0.0)


def _with_bases(format: AdaLog, scale: Tensor, bases: range) -> Candidates:
    base = whole_numbers(bases, len(scale))
    return Candidates(format, {"scale": scale.expand(len(base), *scale.shape), "base": base})
