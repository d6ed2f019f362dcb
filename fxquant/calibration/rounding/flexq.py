"""FlexQ: 6-bit weights in groups of 128, activations of 6 bits, of 8 where that matters most.

The publication's scale is max|w| / 31 with codes clipped to -32 .. 31; -32 is never reached, so these are nearest codes. It
codes activations per token and group of 128; which linears get 8 bits is the outcome of a sensitivity analysis, "down_proj and
fc2" in its repository. ``promote`` is that analysis anew. Unconfirmed: the paper's exact metric; any error will do here.

The stored form is bit planes: with two's complement codes, σ = -1 for the top bit and +1 for the others::

    x · w = Σ_ij σ_i σ_j 2^(i + j) popcount(X_i & W_j)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fxquant.calibration.rounding import nearest
from fxquant.calibration.seen import Seen

BITS, GROUP = 6, 128
LOW_BITS, HIGH_BITS = 6, 8  # of activations


def round_weight(weight: Tensor, bits: int = BITS, group: int = GROUP, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N, G]."""
    return nearest.round_weight(weight, bits, group, seen)


def promote(loss: Mapping[str, float], cost: Mapping[str, float], budget: float) -> dict[str, int]:
    """Activation bits of every class of linears: 8 for those whose loss with 6-bit inputs is largest, as the budget allows.

    ``loss``: what 6 bits at this class alone do to the model's error. ``cost``: what 8 bits for it cost, in the unit of
    ``budget``. Classes are taken by falling loss until one does not fit; one that loses nothing is never taken.
    """
    bits = dict.fromkeys(loss, LOW_BITS)
    for name in sorted(loss, key=lambda name: -loss[name]):
        budget -= cost[name]
        if budget < 0 or loss[name] <= 0:
            break
        bits[name] = HIGH_BITS
    return bits


def bit_planes(codes: Tensor, bits: int) -> Tensor:
    """Planes bool [bits, ..., K] of two's complement codes [..., K], the least significant first."""
    unsigned = codes.to(torch.int64) & (2**bits - 1)
    return torch.stack([(unsigned >> i & 1).to(torch.bool) for i in range(bits)])


def plane_product(x: Tensor, w: Tensor) -> Tensor:
    """x · w, int64, from planes [B, K] and [C, K]."""
    counts = (x[:, None] & w).sum(-1)  # [B, C]
    signed = [torch.tensor([2**i for i in range(len(planes) - 1)] + [-(2 ** (len(planes) - 1))]) for planes in (x, w)]
    return (signed[0][:, None] * signed[1] * counts).sum()
