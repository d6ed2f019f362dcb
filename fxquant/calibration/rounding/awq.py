"""AWQ's clip search: the scale of every channel and group is shrunk to where its part of the output is nearest to float.

Shrinks 1 - k / 20 for k < 10; the error is that of the group's partial dot product over the tokens, eᵀ H_gg e (the published
code takes at most 512 tokens, the Hessian all that were seen, and skips the q and k projections, which is the caller's
choice). AWQ's scale search is a migration: ``calibration.migration.awq``. Affine in the publication, symmetric here because
the kernels are symmetric.
"""

from collections.abc import Sequence

from torch import Tensor

from fxquant.calibration.rounding.grid import as_matrix, encode
from fxquant.calibration.rounding.search import block_metric, search_scale
from fxquant.calibration.seen import Seen

SHRINKS = tuple(1 - k / 20 for k in range(10))  # of the AWQ repository


def choose_scale(weight: Tensor, bits: int, group: int, seen: Seen, shrinks: Sequence[float] = SHRINKS) -> Tensor:
    """The scale of every channel or group, float32 [N] or [N, G]."""
    return search_scale(weight, bits, group, shrinks, block_metric(seen.need("hessian", "awq")))


def round_weight(
    weight: Tensor, bits: int, group: int, seen: Seen, shrinks: Sequence[float] = SHRINKS
) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] or [N, G]."""
    weight = as_matrix(weight, group)
    scale = choose_scale(weight, bits, group, seen, shrinks)
    return encode(weight, scale, bits, group), scale
