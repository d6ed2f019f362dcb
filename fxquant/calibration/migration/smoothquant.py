"""SmoothQuant: ``f_j = a_j^α / w_j^(1-α)``, a_j the greatest |x_j|, w_j the greatest weight of channel j over all consumers.

arXiv 2211.10438 and its repository. α there: OPT, BLOOM 0.5; Llama 0.85 (70B 0.9); Mistral 0.8; Falcon 0.6 (40B 0.7).
Consumers of one input, such as q, k and v, or a router and all experts, share one factor.
"""

from collections.abc import Sequence

from torch import Tensor

from fxquant.calibration.migration import factor as factors
from fxquant.calibration.seen import Seen
from fxquant.errors import CalibrationError

SMALLEST_WEIGHT = 1e-5


def factor(seen: Seen, weights: Sequence[Tensor], alpha: float = 0.5, power_of_two: bool = False) -> Tensor:
    """float32 [K]; with ``power_of_two`` the migration is exact in float arithmetic.

    Raises:
        CalibrationError: absmax is missing, α lies outside of 0 .. 1, or the weights do not fit.
    """
    if not 0 <= alpha <= 1:
        raise CalibrationError(f"smoothquant: α lies in 0 .. 1, not at {alpha}")
    absmax = seen.need("absmax", "smoothquant")
    column = factors.column_absmax(weights).clamp_min(SMALLEST_WEIGHT)
    found = factors.guarded(absmax**alpha / column ** (1 - alpha), absmax)
    return factors.power_of_two(found) if power_of_two else found
