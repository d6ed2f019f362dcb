"""From a float weight to the packed form that the kernels read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.errors import PackError
from fxquant.format_schemes import FormatScheme
from fxquant.linear_formats import format_of
from fxquant.reference import MAX_K, dequantize_weight, quantize_weight, quantize_weight_groups
from fxquant.schemes import LinearScheme, Scheme


@dataclass(frozen=True)
class WeightError:
    """Signal to quantization noise of a rounded weight in dB: over all of it, and in its worst output channel."""

    overall_db: float
    worst_db: float


@dataclass(frozen=True)
class Rounded:
    """A weight [N, K] as its scheme leaves it, float32."""

    value: Tensor


@dataclass(frozen=True)
class Codes:
    """A rounded weight: codes int8 [N, K] and scale float32 [N], or [N, G] where ``group`` input features share one."""

    codes: Tensor
    scale: Tensor
    group: int = 0

    @property
    def value(self) -> Tensor:
        """The weight that the codes stand for, float32 [N, K]."""
        return dequantize_weight(self.codes, self.scale, self.group)


def round_weight(weight: Tensor, scheme: LinearScheme) -> Codes | Rounded:
    """What a float weight [N, K] becomes; raises as ``round_codes`` does."""
    if isinstance(scheme, Scheme):
        return round_codes(weight, scheme)
    check_weight(weight)
    return Rounded(scheme.weight.fake_quant(weight.to(torch.float32)))


def round_codes(weight: Tensor, scheme: Scheme) -> Codes:
    """The codes of a float weight [N, K], with one scale an output channel or a group; raises as ``check_weight`` does."""
    check_weight(weight)
    if scheme.group:
        return Codes(*quantize_weight_groups(weight, scheme.weight_bits, scheme.group), scheme.group)
    return Codes(*quantize_weight(weight, scheme.weight_bits))


def check_weight(weight: Tensor) -> None:
    """Nothing, if a float weight [N, K] can be packed.

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


def pack_codes(rounded: Codes | Rounded, scheme: LinearScheme) -> Tensor:
    """The packed form of a rounded weight: a uint8 vector whose length depends on N, K and the scheme only, or without a
    kernel its value, float32 [N, K]."""
    form = format_of(scheme)
    if form is None or isinstance(rounded, Rounded) or isinstance(scheme, FormatScheme):
        return rounded.value
    return form.pack(rounded.codes, rounded.scale, scheme)


def pack_linear(weight: Tensor, scheme: LinearScheme) -> Tensor:
    """The packed form of a float weight [N, K]; raises as ``round_weight`` does."""
    return pack_codes(round_weight(weight, scheme), scheme)


def weight_error(weight: Tensor, rounded: Codes | Rounded) -> WeightError:
    """What rounding a weight [N, K] cost. A channel that is exact, or zero, counts as infinite."""
    weight = weight.to(torch.float32)
    noise = weight - rounded.value
    noises, signals = (v.square().sum(1).to(torch.float64) for v in (noise, weight))
    worst = torch.where(noises > 0, signals / noises, math.inf).min().item()
    overall = signals.sum().item() / noises.sum().item() if noises.sum() > 0 else math.inf
    return WeightError(_decibel(overall), _decibel(worst))


def _decibel(ratio: float) -> float:
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else ratio
