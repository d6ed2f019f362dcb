"""AWQ's scale search: ``f = x̄^r / √(max x̄^r · min x̄^r)``, r of 0, 1/20, ..., 19/20 with the least error after rounding.

x̄_j is the mean |x_j|. The error is that of the linear's output, over all weights that read the input, or ``loss`` of the caller
(the publication takes the output of the whole attention or MLP block). With ``duo`` (AutoAWQ)
``f = x̄^r / (w̄^(1-r) + 1e-4)``, w̄_j the mean over rows of |w| over its group's maximum.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxquant.calibration.migration import factor as factors
from fxquant.calibration.rounding.grid import row_errors
from fxquant.calibration.seen import Seen

FakeQuant = Callable[[Tensor], Tensor]
Loss = Callable[[Sequence[Tensor]], float]
RATIOS = tuple(i / 20 for i in range(20))


def factor(
    seen: Seen,
    weights: Sequence[Tensor],
    fake_quant: FakeQuant,
    ratios: Sequence[float] = RATIOS,
    loss: Loss | None = None,
    duo_group: int | None = None,
) -> Tensor:
    """float32 [K]. ``fake_quant`` rounds and decodes a weight; ``loss`` judges the weights Q(W f) / f.

    ``duo_group``: the group size of duo scaling (0: a channel), None for the published scales.

    Raises:
        CalibrationError: a statistic is missing or the weights do not fit.
    """
    found = errors(seen, weights, fake_quant, ratios, loss, duo_group)
    return candidate(seen, weights, min(found, key=lambda ratio: found[ratio]), duo_group)


def errors(
    seen: Seen,
    weights: Sequence[Tensor],
    fake_quant: FakeQuant,
    ratios: Sequence[float] = RATIOS,
    loss: Loss | None = None,
    duo_group: int | None = None,
) -> dict[float, float]:
    """The error of every r: the mean squared difference of the outputs, or the caller's loss."""
    found = {}
    for ratio in ratios:
        scale = candidate(seen, weights, ratio, duo_group)
        rounded = [fake_quant(weight * scale) / scale for weight in weights]
        found[ratio] = _error(seen, weights, rounded) if loss is None else float(loss(rounded))
    return found


def candidate(seen: Seen, weights: Sequence[Tensor], ratio: float, duo_group: int | None = None) -> Tensor:
    """The factor of one r."""
    mean = seen.need("mean_abs", "awq").to(torch.float32)
    scale = mean**ratio
    if duo_group is not None:
        scale = scale / (_relative_magnitude(weights, duo_group) ** (1 - ratio) + 1e-4)
    alive = torch.where(mean > 0, scale.clamp_min(factors.LEAST), 1.0)
    return factors.guarded(alive / (alive.amax() * alive.amin()).sqrt(), mean)


def _error(seen: Seen, weights: Sequence[Tensor], rounded: Sequence[Tensor]) -> float:
    hessian = seen.need("hessian", "awq")
    return float(torch.cat([row_errors(old, new, hessian) for old, new in zip(weights, rounded, strict=True)]).mean())


def _relative_magnitude(weights: Sequence[Tensor], group: int) -> Tensor:
    """w̄ float32 [K]."""
    magnitude = torch.cat([weight.to(torch.float32) for weight in weights]).abs()
    parts = magnitude.split(group or magnitude.shape[1], 1)
    return torch.cat([part / (part.amax(1, keepdim=True) + 1e-6) for part in parts], 1).mean(0)
