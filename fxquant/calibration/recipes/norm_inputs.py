"""Inputs of linears that come from a norm: every channel has an own scale and zero point, or an own power of two.

RepQ-ViT makes a coding per channel one of the whole tensor. Here the linear does so for itself, so that it holds whoever else
reads the norm: with s_k, z_k of the channels and one zero point z̃ ::

    x'_k = x_k - s_k (z̃ - z_k)        q_k = clip(rne(x'_k / s_k) + z̃, 0, n - 1)  =  clip(rne(x_k / s_k) + z_k, 0, n - 1)

up to the rounding of x'. The steps s_k go into the weight and the shift into the bias, as ``calibration.site`` says. z̃ is a
whole number, where RepQ-ViT's code leaves the mean as it is: only whole ones keep the codes. vit-quantizers 5.3.

FQ-ViT's power-of-two factor: channel k has the scale 2^α_k s, α_k in 0 .. 3, with the zero point of the widest. It is published
for the inputs of norms, which stay float here; it is used where a norm's output is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.migration.repquant import fake_quant
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.searches.ranges import REPQ_FRACTIONS
from fxquant.reference import SMALLEST

MOST_SHIFT = 3  # FQ-ViT's K
Middle = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ChannelCoding:
    """Scale and whole zero point of every channel, float32 [K]."""

    scale: Tensor
    zero_point: Tensor

    def as_one(self, bits: int, middle: Middle = torch.mean) -> tuple[StaticQParams, Tensor]:
        """(static qparams, shift [K]): the same codes with one zero point.

        ``middle`` is the mean in RepQ-ViT and the median in DopQ-ViT. Which scale is the tensor's cannot change anything
        here: the steps of the channels are what is used.
        """
        zero_point = torch.round(middle(self.zero_point)).clamp(0, 2**bits - 1)
        scale = float(middle(self.scale).clamp_min(SMALLEST))
        static = StaticQParams(self.scale / scale, scale, int(zero_point), 1.0, 0.0, 0.0)
        return static, self.scale * (zero_point - self.zero_point)

    def or_better(self, other: "ChannelCoding", rows: Tensor, bits: int) -> "ChannelCoding":
        """Channel by channel the one with the lower squared error on rows [R, K]; this one on a tie."""
        mine, theirs = (each.errors(rows, bits) for each in (self, other))
        wins = theirs < mine
        return ChannelCoding(torch.where(wins, other.scale, self.scale), torch.where(wins, other.zero_point, self.zero_point))

    def errors(self, rows: Tensor, bits: int) -> Tensor:
        """The squared error of every channel, float32 [K]."""
        return (fake_quant(rows, self.scale, self.zero_point, bits) - rows).square().sum(0)


def percentile_channels(rows: Tensor, bits: int, fractions: Sequence[float] = REPQ_FRACTIONS) -> ChannelCoding:
    """Of the quantiles (1 - p, p) of every channel of rows [R, K] those with the least squared error; ties keep the first."""
    highs = torch.quantile(rows, torch.tensor(fractions), dim=0)
    lows = torch.quantile(rows, 1 - torch.tensor(fractions), dim=0)
    best = channels(lows[0], highs[0], bits)
    for low, high in zip(lows[1:], highs[1:], strict=True):
        best = best.or_better(channels(low, high, bits), rows, bits)
    return best


def channels(low: Tensor, high: Tensor, bits: int) -> ChannelCoding:
    """Min-max; a range need not contain zero, since the zero points of channels are not stored."""
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.maximum(high.abs(), low.abs()) * 1e-6).clamp_min(SMALLEST)
    return ChannelCoding(scale, torch.round(-low / scale))


def power_of_two_factors(rows: Tensor, bits: int) -> StaticQParams:
    """FQ-ViT's PTF for rows [R, K], by the extent of the tensor and the squared error of every channel."""
    low, high = rows.amin().clamp_max(0), rows.amax().clamp_min(0)
    widest = ((high - low) / (2**bits - 1)).clamp_min(SMALLEST * 2**MOST_SHIFT)
    zero_point = torch.round(-low / widest).clamp(0, 2**bits - 1)
    candidates = [widest / 2 ** (MOST_SHIFT - alpha) for alpha in range(MOST_SHIFT + 1)]
    errors = [ChannelCoding(scale, zero_point).errors(rows, bits) for scale in candidates]
    factor = torch.exp2(torch.stack(errors).argmin(0).to(torch.float32))
    return StaticQParams(factor, float(candidates[0]), int(zero_point), 1.0, 0.0, 0.0)
