"""Nearest: the scale is max|w| / m and every weight goes to its nearest code. Needs no data."""

from torch import Tensor

from fxquant.calibration.rounding.grid import absmax_scale, as_matrix, encode
from fxquant.calibration.seen import Seen


def round_weight(weight: Tensor, bits: int, group: int = 0, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] or [N, G]: bit for bit those of ``fxquant.reference``."""
    weight = as_matrix(weight, group)
    scale = absmax_scale(weight, bits, group)
    return encode(weight, scale, bits, group), scale
