"""Inputs of linears that come from a norm: every channel has an own scale and zero point, or an own power of two.

``calibration.channel_coding`` makes the first one coding of the tensor.

FQ-ViT's power-of-two factor: channel k has the scale 2^α_k s, α_k in 0 .. 3, with the zero point of the widest. It is published
for the inputs of norms, which stay float here; it is used where a norm's output is read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.calibration.channel_coding import ChannelCoding
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.searches.ranges import REPQ_FRACTIONS
from fxquant.reference import SMALLEST

MOST_SHIFT = 3  # FQ-ViT's K


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
