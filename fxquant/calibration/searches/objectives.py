"""What searches minimise: errors of a tensor, of a layer's output, and of a distribution. Inputs are float32, sums float64.

Objectives of an output give one error per element ([..., R, N]) or per row ([..., R, 1]), which are then summed, so data can
come in chunks.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fxquant.errors import CalibrationError

# (output, output with quantized operands, gradient of the loss or None), each [..., R, N] -> errors float64
OutputObjective = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def squared_error(values: Tensor, approximation: Tensor, counts: Tensor | None = None) -> Tensor:
    """``Σ count (x - x̂)²`` of each block, float64 [B]."""
    error = (values - approximation).to(torch.float64).square()
    return (error if counts is None else error * counts).sum(1)


def output_mse(output: Tensor, approximation: Tensor, gradient: Tensor | None = None) -> Tensor:
    """``(o - ô)²``."""
    return (output - approximation).to(torch.float64).square()


def hessian_weighted(output: Tensor, approximation: Tensor, gradient: Tensor | None = None) -> Tensor:
    """``(g (o - ô))²`` with the gradient g of the loss at the output: PTQ4ViT's metric.

    Raises:
        CalibrationError: there is no gradient.
    """
    if gradient is None:
        raise CalibrationError("the Hessian-weighted error needs the gradient at the output; use output_mse without one")
    return ((output - approximation).to(torch.float64) * gradient).square()


def cosine(output: Tensor, approximation: Tensor, gradient: Tensor | None = None) -> Tensor:
    """``1 - cos(o, ô)`` of each row, [..., R, 1]: the metric of PTQ4ViT's base method."""
    wide = output.to(torch.float64), approximation.to(torch.float64)
    return 1 - cosine_similarity(*wide, dim=-1).unsqueeze(-1)


def second_order(error: Tensor, gram: Tensor) -> Tensor:
    """``e G eᵀ`` of each row e of a weight's error [N, K], float64 [N]: the summed squared error of its output for G = XᵀX."""
    wide = error.to(torch.float64)
    return ((wide @ gram.to(torch.float64)) * wide).sum(1)


def kl_divergence(reference: Tensor, approximation: Tensor) -> Tensor:
    """``Σ p log(p / q)`` of each row, both [B, n] ≥ 0 and normalised here; infinite where q misses what p has."""
    p = reference.to(torch.float64) / reference.sum(1, keepdim=True)
    q = approximation.to(torch.float64) / approximation.sum(1, keepdim=True)
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(1)
