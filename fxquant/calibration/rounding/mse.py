"""Clipped by the weight's own error: the scale of every channel or group is shrunk to where Σ|w - ŵ|^norm is least.

GPTQ's grid: 1 - i / 100 for i < 80, norm 2.4 (norm 2 is the mean squared error). Needs no data.
"""

from collections.abc import Sequence

from torch import Tensor

from fxquant.calibration.rounding.grid import as_matrix, encode
from fxquant.calibration.rounding.search import power_metric, search_scale
from fxquant.calibration.seen import Seen

SHRINKS = tuple(1 - i / 100 for i in range(80))  # of the GPTQ repository


def choose_scale(weight: Tensor, bits: int, group: int, norm: float = 2.0, shrinks: Sequence[float] = SHRINKS) -> Tensor:
    """The scale of every channel or group, float32 [N] or [N, G]."""
    return search_scale(weight, bits, group, shrinks, power_metric(norm))


def round_weight(
    weight: Tensor, bits: int, group: int = 0, seen: Seen | None = None, norm: float = 2.0, shrinks: Sequence[float] = SHRINKS
) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] or [N, G]."""
    weight = as_matrix(weight, group)
    scale = choose_scale(weight, bits, group, norm, shrinks)
    return encode(weight, scale, bits, group), scale
