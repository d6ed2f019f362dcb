"""Sigmoid attention (Ramapuram et al., 2024): what the kernels compute, slow and clear.

O = sigmoid(scale q kᵀ + bias + mask - slope |i + M - N - j|) v, each weight on its own: no row is normalised. The usual
bias is -log M. Hidden keys (mask False or -inf, or j > i + M - N under ``causal``) have weight 0.
"""

import math

import torch
from torch import Tensor


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    scale: float = 1.0,
    bias: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """[..., N, E] from q [..., N, D], k [..., M, D], v [..., M, E], mask [..., N, M] and slopes [H]; any float dtype."""
    scores = q @ k.transpose(-2, -1) * scale + bias
    n, m = scores.shape[-2:]
    distance = torch.arange(n, device=q.device)[:, None] + (m - n) - torch.arange(m, device=q.device)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(distance < 0, -math.inf)
    return torch.sigmoid(scores) @ v
