"""Bits for every linear under a budget: least Σ S_l(b_l) with Σ n_l b_l ≤ B Σ n_l, by dynamic programming.

S_l(b) is what rounding linear l alone to b bits does to the model's error (additive by assumption: judge the result on the
whole model), n_l its number of weights. ``outlier_score`` is the sensitivity of QuantMoE-Bench that needs no data.
"""

from collections.abc import Mapping, Sequence
from math import inf

from torch import Tensor

from fxquant.errors import CalibrationError


def allocate(loss: Sequence[Mapping[int, float]], sizes: Sequence[int], budget: float) -> tuple[int, ...]:
    """Bits of every linear; ``loss[l][b]`` is S_l(b), ``budget`` the mean number of bits a weight.

    The table has an entry a reachable cost, so give sizes in units (of 1 KiB, say) and few of them.

    Raises:
        CalibrationError: the fewest bits are already too many.
    """
    limit = budget * sum(sizes)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for losses, size in zip(loss, sizes, strict=True):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for cost, (total, bits) in best.items():
            for width, lost in losses.items():
                new = cost + size * width
                if new <= limit and total + lost < longer.get(new, (inf,))[0]:
                    longer[new] = (total + lost, (*bits, width))
        best = longer
    if not best:
        least = sum(size * min(losses) for losses, size in zip(loss, sizes, strict=True)) / sum(sizes)
        raise CalibrationError(f"{budget} bits a weight are too few; the narrowest choice of every linear takes {least:.3g}")
    return min(best.values())[1]


def outlier_score(weight: Tensor) -> float:
    """max_j (max_i |W_ij| / mean_i |W_ij|): the higher, the more bits; columns of zeros count nothing."""
    magnitude = weight.abs()
    mean = magnitude.mean(0)
    return float((magnitude.amax(0)[mean > 0] / mean[mean > 0]).amax()) if bool((mean > 0).any()) else 0.0
