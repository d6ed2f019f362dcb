"""The streamed linear, with a weight scale a group of input features: slow, clear, and what decode kernels must equal.

Weights, b bits, symmetric (qmax = 2^(b-1) - 1), for each output channel n and each group g of ``group`` neighbours of k
(the last group may be shorter; ``group`` 0 is one group of the whole k, which is ``quantize_weight``), all in float32::

    scale[n, g] = max(max_g|w| / qmax, smallest normal float)        q = clip(rne(w / scale), -qmax, qmax)

Integer activations are those of ``quantize_activation`` with 8 bits. With exact integer sums, and float32 sums and
products in this order (g = 0, 1, 2 ...), equal bit for bit everywhere::

    y = ((0 + float(S_0) * (scale_x * scale[n, 0])) + float(S_1) * (scale_x * scale[n, 1])) + ... + bias
    S_g = sum over k in g of (q_x - zero_point) q_w

Float activations: codes and scales are exact; the order of the float32 sums differs between instruction sets and numbers
of rows, so y is within ``float_tolerance`` of the float64 value of::

    y = sum_g scale[n, g] * sum over k in g of x_k q_nk + bias

Codes of a table, 4 bits, stand for any 16 values v; the same holds of them with v[q_nk] for q_nk (``linear_table``).

A row with a value that is not finite gives outputs that are not finite: NaN with integer activations.
"""

import torch
from torch import Tensor

from fxquant.reference.linear import SMALLEST, quantize_activation


def quantize_weight_groups(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N, G] of a finite weight [N, K]; group 0 is one group of K."""
    qmax = 2 ** (bits - 1) - 1
    weight = weight.to(torch.float32)
    parts = weight.split(group or weight.shape[1], 1)
    scale = torch.stack([(part.abs().amax(1) / qmax).clamp_min(SMALLEST) for part in parts], 1)
    codes = torch.round(weight / spread(scale, weight.shape[1], group)).clamp(-qmax, qmax)
    return codes.to(torch.int8), scale


def spread(scale: Tensor, k: int, group: int) -> Tensor:
    """scale [N, G], or [N], → the scale of every weight [N, K]."""
    return scale.view(scale.shape[0], -1).repeat_interleave(group or k, 1)[:, :k]


def dequantize_weight(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """The weight that codes int8 [N, K] stand for, float32, with scale [N], or [N, G] for groups."""
    one_a_row = scale.numel() == codes.shape[0]
    return codes.to(torch.float32) * (scale.view(-1, 1) if one_a_row else spread(scale, codes.shape[1], group))


def fake_quant_per_group(weight: Tensor, bits: int, group: int) -> Tensor:
    """weight [N, K] quantized and dequantized per output channel and group; the dtype stays."""
    codes, scale = quantize_weight_groups(weight, bits, group)
    return dequantize_weight(codes, scale, group).to(weight.dtype)


def group_sums(codes: Tensor, zero_point: Tensor, weight_codes: Tensor, group: int) -> Tensor:
    """S int32 [M, G, N] of activation codes [M, K] with their zero points [M] and weight codes [N, K]."""
    shifted = (codes.to(torch.float64) - zero_point[:, None]).split(group or codes.shape[1], 1)
    weights = weight_codes.to(torch.float64).split(group or codes.shape[1], 1)
    return torch.stack([x @ w.T for x, w in zip(shifted, weights, strict=True)], 1).to(torch.int32)


def linear_groups(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """y float32 [M, N] with 8-bit activations, from x float32 [M, K], codes int8 [N, K], scale [N, G], bias [N] or None."""
    q, scale_x, zero_point = quantize_activation(x, 8)
    sums = group_sums(q, zero_point, codes, group).to(torch.float32)
    y = torch.zeros(x.shape[0], codes.shape[0])
    for g in range(scale.shape[1]):
        y = y + sums[:, g] * (scale_x[:, None] * scale[:, g])
    return y if bias is None else y + bias


def linear_weight_only(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """y float64 [M, N] with float activations, from x [M, K], codes int8 [N, K], scale [N, G], bias [N] or None."""
    weight = codes.to(torch.float64) * spread(scale, codes.shape[1], group).to(torch.float64)
    y = x.to(torch.float64) @ weight.T
    return y if bias is None else y + bias.to(torch.float64)


def linear_table(x: Tensor, codes: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """y float64 [M, N] with float activations, from x [M, K], codes int8 [N, K] of values [16], scale [N, G], bias [N]."""
    return linear_weight_only(x, values.to(torch.float64)[codes.to(torch.int64)], scale, bias, group)


def table_tolerance(x: Tensor, codes: Tensor, values: Tensor, scale: Tensor, group: int) -> Tensor:
    """Largest difference [M, N] of a kernel from ``linear_table``: what K float32 roundings can add up to."""
    weight = values.abs()[codes.to(torch.int64)].to(torch.float64) * spread(scale, codes.shape[1], group).to(torch.float64)
    steps = codes.shape[1] ** 0.5 + 8
    bound: Tensor = torch.finfo(torch.float32).eps * steps * (x.to(torch.float64).abs() @ weight.T)
    return bound


def float_tolerance(x: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """Largest difference [M, N] of a kernel from ``linear_weight_only``: what K float32 roundings can add up to, with
    room for the codes' bias (kernels add x (q + 2^(b-1)) and take the sum of x out again)."""
    magnitude = (codes.to(torch.float64).abs() + 2 ** (bits - 1)) * spread(scale, codes.shape[1], group).to(torch.float64)
    steps = codes.shape[1] ** 0.5 + 8
    bound: Tensor = torch.finfo(torch.float32).eps * steps * (x.to(torch.float64).abs() @ magnitude.T)
    return bound
