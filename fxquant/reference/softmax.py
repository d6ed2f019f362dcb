"""Softmax over the last dimension by (mantissa, exponent) pairs: what the kernels compute, slow and clear.

With n = rne(x / ln 2) and m = e^(x - n ln 2), between 0.7 and 1.42::

    e^x = m 2^n        (a, p) + (b, q) = (a 2^(p - max(p, q)) + b 2^(q - max(p, q)), max(p, q))

The sum of all pairs of a row is one pair (s, t), and softmax = m / s 2^(n - t), log-softmax = x - (t ln 2 + ln s). No term
overflows or vanishes, so no maximum is needed. Rows with an infinity, NaN or a huge value follow e^(x - max) / Σ.
"""

import math

import torch
from torch import Tensor

LARGEST = 1e4  # above it x - n ln 2 loses bits in float32: the other formula is used


def extended_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """e^x as mantissas in float64 and integral exponents in float64."""
    n = torch.round(x.to(torch.float64) / math.log(2.0))
    return torch.exp(x.to(torch.float64) - n * math.log(2.0)), n


def sum_pairs(m: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the last dimension, as one pair a row."""
    top = n.amax(-1)
    return (m * torch.exp2(n - top[..., None])).sum(-1), top


def softmax(x: Tensor, log: bool = False) -> Tensor:
    """softmax (or log-softmax) of float32 x [..., N] over its last dimension; computed in float64, rounded once."""
    if x.numel() == 0:
        return torch.empty_like(x)
    x64 = x.to(torch.float64)
    plain = x64 - x64.amax(-1, keepdim=True)
    by_max = torch.log_softmax(plain, -1) if log else torch.exp(plain) / torch.exp(plain).sum(-1, keepdim=True)
    m, n = extended_exp(x64.clamp(-1e5, 1e5))
    total, top = sum_pairs(m, n)
    if log:
        by_pairs = x64 - (top * math.log(2.0) + total.log())[..., None]
    else:
        by_pairs = m / total[..., None] * torch.exp2(n - top[..., None])
    usual = x64.amax(-1, keepdim=True).abs() <= LARGEST
    return torch.where(usual, by_pairs, by_max).to(x.dtype)
