"""From a float weight to the packed form that the kernels read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import PackError
from fxquant.reference import MAX_K, quantize_weight
from fxquant.schemes import Scheme


@dataclass(frozen=True)
class WeightError:
    """Signal to quantization noise of a rounded weight in dB: over all of it, and in its worst output channel."""

    overall_db: float
    worst_db: float


def pack_linear(weight: Tensor, scheme: Scheme) -> Tensor:
    """The packed form (uint8 vector) of a float weight [N, K]; its length depends on N, K and the scheme only.

    Raises:
        PackError: the weight is no matrix, is empty, is not finite, or has more than MAX_K columns.
    """
    if weight.dim() != 2 or 0 in weight.shape:
        raise PackError(f"a weight of shape {tuple(weight.shape)} cannot be packed; it must be a non-empty matrix")
    if weight.shape[1] > MAX_K:
        raise PackError(f"{weight.shape[1]} input features could overflow the int32 sums; at most {MAX_K} are exact")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise PackError(f"the weight holds {bad} values that are not finite")
    codes, scale = quantize_weight(weight, scheme.weight_bits)
    packed: Tensor = torch.ops.fxquant.pack_linear(codes, scale, scheme.weight_bits, scheme.act_bits)
    return packed


def weight_error(weight: Tensor, bits: int) -> WeightError:
    """What rounding a finite weight [N, K] to ``bits`` costs. A channel that is exact, or zero, counts as infinite."""
    weight = weight.to(torch.float32)
    codes, scale = quantize_weight(weight, bits)
    noise = (weight - codes.to(torch.float32) * scale[:, None]).square().sum(1, dtype=torch.float64)
    signal = weight.square().sum(1, dtype=torch.float64)
    worst = torch.where(noise > 0, signal / noise, math.inf).min().item()
    overall = signal.sum().item() / noise.sum().item() if noise.sum() > 0 else math.inf
    return WeightError(_decibel(overall), _decibel(worst))


def _decibel(ratio: float) -> float:
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else ratio
