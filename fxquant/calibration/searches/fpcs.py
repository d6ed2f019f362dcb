"""AdaLog's fast progressive combining search: a coarse grid, then finer and finer scales around the best few.

vit-quantizers 9.4, confirmed, the scales between the quantile ranges as in the reference code. Two choices of ours: the best
candidate that was ever judged is kept (children do not contain their parent, so the reference may end on a worse one), and
scales have the floor of the kernels instead of 1e-4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.searches.metric import Candidates, Choice, Metric, best_of, finite
from fxquant.calibration.searches.scale_grid import refuse_power_of_two
from fxquant.errors import CalibrationError
from fxquant.formats.uniform import Uniform
from fxquant.reference import SMALLEST

EVALUATIONS = 128
MOST_ZERO_POINTS = 16


@dataclass(frozen=True)
class Progress:
    """``keep`` candidates stay after a step, and each spawns ``children`` scales, ``refinements`` times."""

    keep: int = 16
    children: int = 8
    refinements: int = 5


# (scale, base) of AdaLog after GELU.
LOG_PROGRESS = Progress(keep=32, children=4)


def fpcs(metric: Metric, samples: Samples, format: Uniform, *, zero_points: int | None = None) -> Choice:
    """(scale, zero point) of affine codes.

    ``zero_points``: how many whole numbers around n / 2 are tried; by default min(16, n), as for activations of linears;
    the published number for weights and for operands of matmuls is min(16, n / 2), at least 1.
    """
    refuse_power_of_two(metric.site, format)
    if format.is_symmetric:
        raise CalibrationError(f"{metric.site}: {format.name} has no zero point to search; use scale_grid")
    count = zero_points or min(MOST_ZERO_POINTS, format.code_count)
    start, spacing = _coarse(samples, format, count)
    return combine_progressively(metric, start, spacing)


def weight_zero_points(format: Uniform) -> int:
    """The published number of zero points for weights and for operands of matmuls."""
    return min(MOST_ZERO_POINTS, format.code_count // 2)


def combine_progressively(
    metric: Metric, start: Candidates, spacing: Tensor, progress: Progress = Progress(), *, name: str = "scale"
) -> Choice:
    """Refine ``name`` of the best candidates; the other qparams stay as they are in ``start``.

    Children are at ``s + (linspace(0, 1, c) - 1/2) Δ``; Δ [B, 1] starts as ``spacing`` and is divided by c - 1/2 each time.
    """
    candidates, losses = start, metric.losses(start)
    best = best_of(candidates, losses)
    offsets = torch.linspace(0, 1, progress.children)[:, None, None] - 0.5
    for _ in range(progress.refinements):
        kept = best_few(candidates, losses, progress.keep)
        spread = (kept[name][:, None] + offsets * spacing).reshape(-1, *spacing.shape).clamp_min(SMALLEST)
        others = {key: value.repeat_interleave(progress.children, 0) for key, value in kept.items()}
        candidates, spacing = Candidates(start.format, {**others, name: spread}), spacing / (progress.children - 0.5)
        losses = metric.losses(candidates)
        best = _better(best, best_of(candidates, losses))
    return finite(metric.site, best)


def _coarse(samples: Samples, format: Uniform, zero_points: int) -> tuple[Candidates, Tensor]:
    """Every zero point with scales that run from the 0.1 .. 0.9 range to the whole one; and the spacing of the scales."""
    low, high = samples.extent()
    narrow, wide = samples.quantile(0.9) - samples.quantile(0.1), high - low
    count = EVALUATIONS // zero_points
    share = torch.linspace(0, 1, count)[:, None, None]
    scales = ((narrow + share * (wide - narrow)) / format.qmax).clamp_min(SMALLEST)
    first = format.code_count // 2 - zero_points // 2
    points = torch.arange(first, first + zero_points, dtype=torch.float32)
    zero_point = points.repeat_interleave(count)[:, None, None].expand(-1, *low.shape)
    grid = Candidates(format, {"scale": scales.repeat(zero_points, 1, 1), "zero_point": zero_point})
    return grid, scales[1] - scales[0]


def best_few(candidates: Candidates, losses: Tensor, count: int) -> Mapping[str, Tensor]:
    """Qparams [≤ count, B, 1] of the candidates with the least loss of every block, best first, equal ones in their order."""
    order = torch.argsort(torch.where(torch.isnan(losses), torch.inf, losses), dim=0, stable=True)
    return candidates.pick(order[:count])


def _better(first: Choice, second: Choice) -> Choice:
    """Blockwise the one with less loss; ties keep the first."""
    wins = second.loss < first.loss
    qparams = {name: torch.where(wins[:, None], second.qparams[name], value) for name, value in first.qparams.items()}
    return Choice(first.format, qparams, torch.where(wins, second.loss, first.loss))
