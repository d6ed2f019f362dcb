"""Attention on codes (after SageAttention, Zhang et al., 2024): what the kernels compute, slow and clear.

Queries and centred keys, b bits, one scale a row, symmetric (top = 2^(b-1) - 1), all in float32::

    mean = sum_j k_j / M          largest = max(max_c |x_c|, 2^-100) of x = q_i or k_j - mean
    q = rne(x * (top / largest))  scale = largest / top

The mean is one constant a row of scores, which softmax does not see; what is not finite counts as 0 in it, and a mean that
overflows is 0. A row with a value that is not finite has codes 0 and scale NaN: whoever sees it is NaN. Scores in base 2::

    s_ij = float(sum_c q_ic q_jc) * (scale_i * (scale * log2 e) * scale_j) + mask * log2 e

Then softmax and the product with v in float32, or with ``pv_bits`` 8 on codes too: over blocks of 512 keys, with the
maximum m of a row so far, t = max(s - m, -127), n = rne(t), f = t - n and fused multiply-adds::

    w = rne(2^n (c0 + f (c1 + f (c2 + f c3))))    about 255 2^t, 0 .. 255
    centre = (low + high) / 2 of a channel        largest = max(high - centre, centre - low, 2^-100)
    q_v = rne((v - centre) * (127 / largest))     y = sum_j w_j q_vj / sum_j w_j * (largest / 127) + centre

Weights are divided by their own sum, so they sum to 1 and the centre comes back exactly. Earlier blocks are scaled by
2^(m before - m). A channel of v with a value that is not finite is NaN; a row that sees no key is 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KEY_BLOCK = 512
SMALLEST = 2.0**-100
WEIGHTS = tuple(map(float.fromhex, ("0x1.fdf69cp+7", "0x1.619028p+7", "0x1.eeed3cp+5", "0x1.c23368p+3")))
LOG2E = torch.tensor(math.log2(math.e), dtype=torch.float32)
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Trace:
    """Everything on the way: out [..., N, e], codes int8, scales float32, sums int32 and weights uint8 [..., N, M]."""

    out: Tensor
    q_codes: Tensor
    k_codes: Tensor
    q_scales: Tensor
    k_scales: Tensor
    sums: Tensor
    weights: Tensor


def divide(number: float, by: Tensor) -> Tensor:
    """number / by, rounded once: the operator on a number and a tensor multiplies by a rounded reciprocal."""
    return torch.full_like(by, number) / by


def key_mean(k: Tensor) -> Tensor:
    """The mean [..., d] over the keys of float32 k [..., M, d], summed one key after the other."""
    total = torch.zeros_like(k[..., 0, :])
    for key in torch.where(torch.isfinite(k), k, 0.0).unbind(-2):
        total = total + key
    return torch.where(torch.isfinite(total), total / k.shape[-2], 0.0)


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """codes int8 [..., d] and scale float32 [...] of float32 x [..., d]."""
    top = 2 ** (bits - 1) - 1
    finite = torch.isfinite(x).all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    largest = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    codes = torch.round(x * divide(top, largest)).to(torch.int8)
    return codes, torch.where(finite, largest / top, math.nan)[..., 0]


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes int8 [..., M, e], scale and centre float32 [..., 1, e] of float32 v [..., M, e]."""
    finite = torch.isfinite(v).all(-2, keepdim=True)
    v = torch.where(finite, v, 0.0)
    low, high = v.amin(-2, keepdim=True), v.amax(-2, keepdim=True)
    centre = low * 0.5 + high * 0.5
    largest = torch.maximum(high - centre, centre - low).clamp_min(SMALLEST)
    codes = torch.round((v - centre) * divide(127, largest)).to(torch.int8)
    return codes, torch.where(finite, largest / 127, math.nan), centre


def weigh(t: Tensor) -> Tensor:
    """The weights, float32 integers, of float32 t <= 0 (base 2)."""
    t = torch.where(t < -127, -127.0, t)
    n = torch.round(t)
    f = (t - n).to(torch.float64)
    p = torch.full_like(f, WEIGHTS[3])
    for c in reversed(WEIGHTS[:3]):
        p = (p * f + c).to(torch.float32).to(torch.float64)  # one rounding, as a fused multiply-add has
    return torch.round(torch.ldexp(p.to(torch.float32), n))


def base2_scores(sums: Tensor, row: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """float32 scores [..., N, M] from int32 sums and the scales of rows (softmax's in them) and keys."""
    return add_mask(sums.to(torch.float32) * (row[..., :, None] * key[..., None, :]), mask, is_causal)


def add_mask(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """float32 scores [..., N, M] in base 2 with a mask; a finite mask stays finite."""
    if mask is not None and mask.dtype == torch.bool:
        scores = scores + torch.where(mask, 0.0, -math.inf)
    elif mask is not None:
        added = mask * LOG2E
        scores = scores + torch.where((mask >= LOWEST) & (added < LOWEST), LOWEST, added)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = torch.where(seen, scores, -math.inf)
    return scores


def attention_int(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    qk_bits: int = 8,
    pv_bits: int = 0,
) -> Trace:
    """Attention of float32 q [B, H, N, d] to k [B, G, M, d] and v [B, G, M, e], or without the heads; G divides H."""
    q_codes, q_scales = quantize_rows(q, qk_bits)
    k_codes, k_scales = quantize_rows(k - key_mean(k)[..., None, :], qk_bits)
    groups = q.shape[1] // k.shape[1] if q.dim() == 4 else 1
    spread = [x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k_codes, k_scales, v)]
    sums = (q_codes.to(torch.float64) @ spread[0].to(torch.float64).mT).to(torch.int32)  # |sums| < 2^24
    given = torch.tensor(q.shape[-1] ** -0.5 if scale is None else scale, dtype=torch.float32)
    row = q_scales * (given.to(torch.float64) * math.log2(math.e)).to(torch.float32)
    scores = base2_scores(sums, row, spread[1], mask, is_causal)
    weights = torch.zeros_like(sums, dtype=torch.uint8)
    out = mix(scores, spread[2], weights) if pv_bits else mix_floats(scores, spread[2])
    return Trace(out, q_codes, k_codes, q_scales, k_scales, sums, weights)


def mix_floats(scores: Tensor, v: Tensor) -> Tensor:
    """softmax2(scores) v in float64, rounded once; rows without a key are 0."""
    wide = scores.to(torch.float64)
    top = wide.amax(-1, keepdim=True)
    weights = torch.exp2(wide - torch.where(top == -math.inf, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    out = weights @ v.to(torch.float64) / torch.where(total == 0, 1.0, total)
    return out.to(torch.float32)


def mix(scores: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """The product on codes; ``weights`` uint8 [..., N, M] is filled."""
    codes, scale, centre = quantize_values(v)
    out = torch.zeros((*scores.shape[:-1], v.shape[-1]))
    total = torch.zeros((*scores.shape[:-1], 1))
    top = torch.full_like(total, -math.inf)
    for first in range(0, scores.shape[-1], KEY_BLOCK):
        block = slice(first, first + KEY_BLOCK)
        s = scores[..., block]
        highest = torch.maximum(top, torch.where(s.isnan(), -math.inf, s).amax(-1, keepdim=True))
        shift = torch.where(highest == -math.inf, 0.0, highest)
        t = s - shift
        w = torch.where(t.isnan(), 0.0, weigh(t))
        weights[..., block] = w.to(torch.uint8)
        by = torch.where(top == -math.inf, 0.0, torch.exp2(top - shift))
        total = total * by + torch.where(t.isnan().any(-1, keepdim=True), math.nan, w.sum(-1, keepdim=True))
        sums = w.to(torch.float64) @ codes[..., block, :].to(torch.float64)
        out = out * by + sums.to(torch.float32)
        top = highest
    seen = out * divide(1, total) * scale + centre
    return torch.where(total == 0, 0.0, seen)
