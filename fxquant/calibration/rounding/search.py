"""Scales shrunk on a grid, each channel or group on its own, for the least error of a metric: mse, diagonal, block.

For p in ``shrinks`` the candidate is p max|w| / m; the first of equal candidates stays. A metric takes the errors e of one
group of columns, float32 [N, n], and gives one number a row: Σ|e|^norm, Σ h_k e_k², or eᵀ H_gg e with the part of the
Hessian that belongs to the group.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fxquant.calibration.rounding.grid import absmax_scale, largest_code
from fxquant.reference import SMALLEST

Metric = Callable[[Tensor, slice], Tensor]


def power_metric(norm: float) -> Metric:
    """Σ|e|^norm."""
    return lambda error, columns: error.abs().pow(norm).sum(1)


def diagonal_metric(diagonal: Tensor) -> Metric:
    """Σ h_k e_k² for h [K]."""
    diagonal = diagonal.to(torch.float32)
    return lambda error, columns: error.square() @ diagonal[columns]


def block_metric(hessian: Tensor) -> Metric:
    """eᵀ H_gg e for H [K, K]."""
    hessian = hessian.to(torch.float32)
    return lambda error, columns: (error @ hessian[columns, columns] * error).sum(1)


def search_scale(weight: Tensor, bits: int, group: int, shrinks: Sequence[float], metric: Metric) -> Tensor:
    """The best scale of every channel or group, float32 [N] or [N, G]."""
    k, scale = weight.shape[1], absmax_scale(weight, bits, group)
    size = group or k
    found = [_best(weight[:, i : i + size], bits, shrinks, metric, slice(i, min(i + size, k))) for i in range(0, k, size)]
    return torch.stack(found, 1).view(scale.shape)


def _best(part: Tensor, bits: int, shrinks: Sequence[float], metric: Metric, columns: slice) -> Tensor:
    """The best shrunk scale [N] of one group of columns [N, n]."""
    m, extent = largest_code(bits), part.abs().amax(1) / largest_code(bits)
    return best_scale(part, ((extent * shrink).clamp_min(SMALLEST) for shrink in shrinks), (-m, m), metric, columns)


def best_scale(part: Tensor, scales: Iterable[Tensor], limits: tuple[int, int], metric: Metric, columns: slice) -> Tensor:
    """Of scales [N] for weights [N, n], which lie in these columns, that of least error for every row; the first of equal ones.

    ``limits`` are the least and the greatest code. Where no error is a number the first scale stays.
    """
    best, least = None, torch.full((len(part),), torch.inf)
    for scale in scales:
        error = metric(part - torch.round(part / scale[:, None]).clamp(*limits) * scale[:, None], columns)
        best = scale if best is None else torch.where(error < least, scale, best)
        least = torch.where(error < least, error, least)
    assert best is not None
    return best
