"""Factors from the input alone: a power of each channel's range, or FPTQ's logarithmic equalization.

``power``: ``f_j = (a_j / max a)^e``; e = 1 gives all channels one range, e = 1/2 is SmoothQuant without the weight.
``logarithmic``: ``f_j = a_j / log2(2 + a_j)``, so that a channel's range becomes log2(2 + a_j). Unconfirmed: recalled from
FPTQ (arXiv 2308.15987).
"""

from torch import Tensor, log2

from fxquant.calibration.migration.factor import guarded
from fxquant.calibration.seen import Seen


def power(seen: Seen, exponent: float = 0.5) -> Tensor:
    """float32 [K]."""
    absmax = seen.need("absmax", "power")
    return guarded((absmax / absmax.amax()) ** exponent, absmax)


def logarithmic(seen: Seen) -> Tensor:
    """float32 [K]."""
    absmax = seen.need("absmax", "logarithmic")
    return guarded(absmax / log2(2 + absmax), absmax)
