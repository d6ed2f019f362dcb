"""SmoothQuant+: SmoothQuant with one α for the whole model, the α at which quantized weights lose least.

``error(alpha)`` is the caller's: smooth every norm with that α, round all weights, and give the loss of the model, in the
publication (arXiv 2312.03788) the sum over its linears of ‖X Wᵀ - (X / f) Q(f W)ᵀ‖². Unconfirmed, since the search was never
released: the grid (0 .. 1 in steps of 1/20) and that the loss is a sum over all layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxquant.errors import CalibrationError

ALPHAS = tuple(i / 20 for i in range(21))


@dataclass(frozen=True)
class Search:
    """The best α, and the error of every α that was tried."""

    alpha: float
    errors: dict[float, float]


def search(error: Callable[[float], float], alphas: Sequence[float] = ALPHAS) -> Search:
    """The α of the least error, the first of equal ones.

    Raises:
        CalibrationError: there is no α, or an error is no number.
    """
    errors = {alpha: float(error(alpha)) for alpha in alphas}
    if not errors or any(value != value for value in errors.values()):
        raise CalibrationError(f"smoothquant_plus: there is no least error among {errors}")
    return Search(min(errors, key=lambda alpha: errors[alpha]), errors)
