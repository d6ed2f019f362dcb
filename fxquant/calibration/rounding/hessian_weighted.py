"""Clipped by the error at the output, features taken as uncorrelated: Σ h_k (w_k - ŵ_k)² with h the mean squares of the input.

The metric is the diagonal of the Hessian (HAWQ and the scale searches of PTQ4ViT's kind use it so). With a hessian its
diagonal is read, else the mean squares.
"""

from collections.abc import Sequence

from torch import Tensor

from fxquant.calibration.rounding.grid import as_matrix, encode
from fxquant.calibration.rounding.mse import SHRINKS
from fxquant.calibration.rounding.search import diagonal_metric, search_scale
from fxquant.calibration.seen import Seen


def choose_scale(weight: Tensor, bits: int, group: int, seen: Seen, shrinks: Sequence[float] = SHRINKS) -> Tensor:
    """The scale of every channel or group, float32 [N] or [N, G]."""
    known = seen.hessian.diagonal() if seen.hessian is not None else seen.need("mean_square", "hessian_weighted")
    return search_scale(weight, bits, group, shrinks, diagonal_metric(known))


def round_weight(
    weight: Tensor, bits: int, group: int, seen: Seen, shrinks: Sequence[float] = SHRINKS
) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] or [N, G]."""
    weight = as_matrix(weight, group)
    scale = choose_scale(weight, bits, group, seen, shrinks)
    return encode(weight, scale, bits, group), scale
