"""Clipped at a percentile: the scale of every channel is a quantile of |w| over m, the one of least squared error.

RepQ-ViT's and I&S-ViT's weights, whose affine codes have two-sided quantiles; symmetric here, as the
kernels are. Needs no data.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.calibration.rounding.grid import as_matrix, encode, largest_code
from fxquant.calibration.rounding.search import best_scale, power_metric
from fxquant.calibration.searches.ranges import REPQ_FRACTIONS
from fxquant.calibration.seen import Seen
from fxquant.errors import CalibrationError
from fxquant.reference import SMALLEST


def round_weight(
    weight: Tensor, bits: int, group: int = 0, seen: Seen | None = None, fractions: Sequence[float] = REPQ_FRACTIONS
) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N].

    Raises:
        CalibrationError: there are groups, in which a percentile is that of a few values.
    """
    if group:
        raise CalibrationError(f"percentiles are of whole output channels; a scheme without the group of {group} has them")
    weight = as_matrix(weight, group)
    m = largest_code(bits)
    scales = (torch.quantile(weight.abs(), torch.tensor(fractions), dim=1) / m).clamp_min(SMALLEST)
    best = best_scale(weight, scales, (-m, m), power_metric(2.0), slice(None))
    return encode(weight, best, bits, 0), best
