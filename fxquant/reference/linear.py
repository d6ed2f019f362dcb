"""The low-bit linear: slow, clear, and what every kernel must equal bit for bit.

Weights, b bits, per output channel, symmetric (qmax = 2^(b-1) - 1), all in float32::

    scale = max(max|w| / qmax, smallest normal float)        q = clip(rne(w / scale), -qmax, qmax)

Activations, b bits, per token, affine unsigned (qmax = 2^b - 1), scale and zero point found at run time::

    low = min(x, 0)   high = max(x, 0)   scale = max(high / qmax - low / qmax, smallest normal float)
    zero_point = clip(rne(-low / scale), 0, qmax)        q = clip(rne(x / scale) + zero_point, 0, qmax)

``rne`` rounds half to even and ``/`` is true division. A token with a value that is not finite has scale NaN, zero
point 0 and codes 0, so its outputs are NaN. The product, with exact integer sums and float32 products in this order::

    y = float(sum_k (q_x - zero_point) q_w) * (scale_x * scale_w) + bias

Static activations are coded by the same last formula with given steps (positive normal float32, one a channel or one for
all) and one zero point (0 .. qmax) for all tokens; what lies outside their range is clipped, and a token that is not finite
still gives NaN. The weight is multiplied by the steps before it is rounded, so no scale of x is left::

    q_k = clip(rne(x_k / step_k) + zero_point, 0, qmax)        scale_w and q_w: those of w_nk * step_k, in float32
    y = float(sum_k (q_k - zero_point) q_w) * scale_w + bias
"""

import math

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny
MAX_K = 2**31 // (255 * 127)  # 8-bit products of more input features could overflow an int32 sum


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] of a finite weight [N, K]."""
    qmax = 2 ** (bits - 1) - 1
    weight = weight.to(torch.float32)
    scale = (weight.abs().amax(1) / qmax).clamp_min(SMALLEST)
    codes = torch.round(weight / scale[:, None]).clamp(-qmax, qmax)
    return codes.to(torch.int8), scale


def quantize_activation(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes uint8 [..., K], scale float32 [...] and zero_point int32 [...] of x float32 [..., K]."""
    qmax = 2**bits - 1
    finite = torch.isfinite(x).all(-1)
    x = torch.where(finite[..., None], x, 0.0)
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    scale = (high / qmax - low / qmax).clamp_min(SMALLEST)
    zero_point = torch.round(-low / scale).clamp(0, qmax)
    codes = (torch.round(x / scale[..., None]) + zero_point[..., None]).clamp(0, qmax)
    codes = torch.where(finite[..., None], codes, 0.0)
    return (
        codes.to(torch.uint8),
        torch.where(finite, scale, math.nan),
        torch.where(finite, zero_point, 0.0).to(torch.int32),
    )


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """codes uint8 [..., K] of x float32 [..., K] for steps float32 [K] or [1] and a zero point int32 [1]; not finite: 0."""
    quotient = torch.where(torch.isfinite(x), x, 0.0) / scale.reshape(-1)
    codes = (torch.round(quotient) + zero_point.reshape(())).clamp(0, 2**bits - 1)
    return torch.where(torch.isfinite(x).all(-1, keepdim=True), codes, 0.0).to(torch.uint8)


def linear_sums(codes: Tensor, zero_point: Tensor, weight_codes: Tensor) -> Tensor:
    """sum_k (q_x - zero_point) q_w, exactly, int32 [..., N]."""
    shifted = codes.to(torch.float64) - zero_point[..., None]
    return (shifted @ weight_codes.to(torch.float64).T).to(torch.int32)  # |sums| < 2^31: exact in float64


def linear_dynamic(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, act_bits: int) -> Tensor:
    """y float32 [..., N] from x float32 [..., K], weight codes int8 [N, K], their scale [N] and a bias [N] or None."""
    q, scale_x, zero_point = quantize_activation(x, act_bits)
    y = linear_sums(q, zero_point, codes).to(torch.float32) * (scale_x[..., None] * scale)
    return y if bias is None else y + bias


def linear_static(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, steps: Tensor, zero_point: Tensor, act_bits: int
) -> Tensor:
    """y float32 [..., N] for given steps (float32 [K] or [1]); codes int8 [N, K] and scale [N] are those of weight * step."""
    q = quantize_static(x, steps, zero_point, act_bits)
    sums = linear_sums(q, zero_point.reshape(()).expand(x.shape[:-1]), codes)
    finite = torch.isfinite(x).all(-1, keepdim=True)
    y = torch.where(finite, sums.to(torch.float32) * scale, math.nan)
    return y if bias is None else y + bias


def fake_quant_per_token(x: Tensor, bits: int) -> Tensor:
    """x quantized and dequantized per token; the dtype stays."""
    codes, scale, zero_point = quantize_activation(x.to(torch.float32), bits)
    return ((codes.to(torch.float32) - zero_point[..., None]) * scale[..., None]).to(x.dtype)


def fake_quant_static(x: Tensor, steps: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """x [..., K] quantized and dequantized with given steps (float32 [K] or [1]) and zero point; the dtype stays."""
    codes = quantize_static(x.to(torch.float32), steps, zero_point, bits)
    value = (codes.to(torch.float32) - zero_point.reshape(())) * steps.reshape(-1)
    return torch.where(torch.isfinite(x).all(-1, keepdim=True), value, math.nan).to(x.dtype)


def fake_quant_per_channel(weight: Tensor, bits: int) -> Tensor:
    """weight [N, K] quantized and dequantized per output channel; the dtype stays."""
    codes, scale = quantize_weight(weight, bits)
    return (codes.to(torch.float32) * scale[:, None]).to(weight.dtype)
