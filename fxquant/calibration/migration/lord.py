"""Low rank: one linear W [N, K] becomes two thin ones, B [N, r] after A [r, K].

LoRD (arXiv 2309.14021), in the form with the least squared output error (unconfirmed: its own decomposition may differ). With
y = W x + b, μ its mean, V the r first eigenvectors of its covariance Σ = W cov(x) Wᵀ::

    A = Vᵀ W        B = V        b' = V Vᵀ (b - μ) + μ        mean ‖y - y'‖² = the sum of the eigenvalues left out

That is the singular value decomposition of W whitened by the input's covariance. ``truncate`` is PELA's, without data.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.seen import Seen
from fxquant.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class LowRank:
    """``down`` A [r, K], ``up`` B [N, r], ``bias`` [N]; ``error`` the mean over tokens of the squared error of the output."""

    down: Tensor
    up: Tensor
    bias: Tensor
    error: float


def factorize(weight: Tensor, bias: Tensor | None, rank: int, seen: Seen) -> LowRank:
    """LoRD's factors, float64; without ``mean`` the input's mean is taken to be 0, and the bias stays.

    Raises:
        CalibrationError: the rank or the hessian does not fit.
    """
    _check(weight, rank)
    wide = weight.to(torch.float64)
    second = seen.need("hessian", "lord").to(torch.float64) / 2
    mean = torch.zeros_like(wide[0]) if seen.mean is None else seen.mean.to(torch.float64)
    offset = torch.zeros_like(wide[:, 0]) if bias is None else bias.to(torch.float64)
    values, vectors = torch.linalg.eigh(wide @ (second - mean[:, None] * mean) @ wide.T)
    basis, centre = vectors[:, len(wide) - rank :], wide @ mean  # the eigenvalues rise
    new = basis @ (basis.T @ -centre) + centre + offset
    return LowRank(basis.T @ wide, basis, new, float(values[: len(wide) - rank].clamp_min(0).sum()))


def truncate(weight: Tensor, bias: Tensor | None, rank: int) -> LowRank:
    """PELA's factors √S Vᵀ and U √S, float64; ``error`` is the squared error of the weight."""
    _check(weight, rank)
    left, values, right = torch.linalg.svd(weight.to(torch.float64), full_matrices=False)
    root = values[:rank].sqrt()
    offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.to(torch.float64)
    return LowRank(root[:, None] * right[:rank], left[:, :rank] * root, offset, float(values[rank:].square().sum()))


def break_even(n: int, k: int) -> float:
    """The rank at which two thin linears have as many weights as one: N K / (N + K)."""
    return n * k / (n + k)


def pela_rank(n: int, k: int, ratio: int) -> int:
    """⌊N K / (c (N + K))⌋ for c times fewer weights."""
    return n * k // (ratio * (n + k))


def _check(weight: Tensor, rank: int) -> None:
    if not 0 < rank <= min(weight.shape):
        raise CalibrationError(f"a weight {tuple(weight.shape)} has ranks 1 .. {min(weight.shape)}, not {rank}")
