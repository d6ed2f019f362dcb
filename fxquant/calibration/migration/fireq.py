"""FireQ's scales: columns of a weight, keys under rotary embeddings, and a power of two for FP8 group scales.

Columns: ``f_j = c / mean_i |W_ij|`` (or the maximum), so that all columns of W f weigh the same. Constants of the repository
for Llama-3-8B: gate and up 0.0096, down 0.015, q, k, v and o none, values times 0.9.

Keys: rotary embeddings mix the channels j and j + d/2, so a scale commutes with them where both share it. Before: ``α / a_j``
with ``a_j = max_t √(k_j² + k_(j + d/2)²)``, folded into the rows of k and, inverted, of every query head of the group. After:
the worst ``top_k`` channels of a head and their partners get ``β / max|k|`` at run time and 1 before. arXiv 2505.20839, code.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxquant.calibration.migration.factor import guarded
from fxquant.errors import CalibrationError

SMALLEST_E4M3 = 2.0**-9
SMALLEST_NORMAL_E4M3 = 2.0**-6
GREATEST_E4M3 = 448.0
EXPONENTS = range(15)  # of the tensor's power of two


def column_factor(weight: Tensor, constant: float, of: Literal["mean", "max"] = "mean") -> Tensor:
    """float32 [K]: the weight is multiplied by it, its input divided."""
    magnitude = weight.to(torch.float32).abs()
    column = magnitude.mean(0) if of == "mean" else magnitude.amax(0)
    return guarded(constant / column)


@dataclass(frozen=True, eq=False)
class KeyScales:
    """What keys are multiplied by before and after the rotary embedding, float32 [H_kv, d]; queries by the inverse."""

    before: Tensor
    after: Tensor

    def queries(self, heads: int) -> "KeyScales":
        """The inverses for ``heads`` query heads: head h reads key head h // (heads / H_kv)."""
        repeat = heads // len(self.before)
        return KeyScales(*(scale.reciprocal().repeat_interleave(repeat, 0) for scale in (self.before, self.after)))


def key_scales(before: Tensor, after: Tensor | None = None, top_k: int = 3, alpha: float = 1.0, beta: float = 1.0) -> KeyScales:
    """Scales from keys [T, H_kv, d] before the rotary embedding and, for the worst channels, [T, H_kv, d] after it.

    Raises:
        CalibrationError: d is odd, or top_k channels are too many.
    """
    size = before.shape[-1]
    if size % 2 or not 0 <= top_k <= size:
        raise CalibrationError(f"keys of {size} channels have no pairs, or no {top_k} worst ones")
    low, high = before.chunk(2, -1)
    pair = (low.square() + high.square()).amax(0).sqrt()  # [H_kv, d / 2]
    scale = guarded(alpha / pair, pair).repeat(1, 2)
    if after is None or not top_k:
        return KeyScales(scale, torch.ones_like(scale))
    extent = after.abs().amax(0)
    worst = torch.zeros_like(scale, dtype=torch.bool).scatter_(1, extent.topk(top_k, -1).indices, True)
    worst |= worst.roll(size // 2, -1)
    return KeyScales(torch.where(worst, 1.0, scale), torch.where(worst, guarded(beta / extent, extent), 1.0))


def tensor_scale(weight: Tensor, group: int, smallest: float = SMALLEST_E4M3, qmax: int = 7) -> float:
    """T = 2^n, n of 0 .. 14, by which W is multiplied so that group scales max|w| / qmax survive as FP8 e4m3.

    The smallest n with the least Σ (w_min - max|w| T) / w_min over groups below w_min = qmax · ``smallest``, as long as no
    group exceeds 448. With ``SMALLEST_NORMAL_E4M3`` scales keep all four bits.
    """
    parts = weight.to(torch.float32).split(group or weight.shape[1], 1)
    extent = torch.stack([part.abs().amax(1) for part in parts])
    least = qmax * smallest
    best, slack = 1.0, float("inf")
    for n in EXPONENTS:
        scaled = extent * 2.0**n
        if bool((scaled > GREATEST_E4M3).any()):
            break
        found = float(((least - scaled) / least).clamp_min(0).sum())
        if found < slack:
            best, slack = 2.0**n, found
    return best


def fp8_scale(scale: Tensor) -> Tensor:
    """Scales rounded to e4m3 and back, float32; what would become 0 becomes 2^-9."""
    rounded = scale.clamp_max(GREATEST_E4M3).to(torch.float8_e4m3fn).to(torch.float32)
    return rounded.clamp_min(SMALLEST_E4M3)
