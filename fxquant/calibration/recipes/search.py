"""The recipe of ours: shift and factor of every channel by predicted noise, static where that costs little, then GPTQ.

``migration.balance`` learns shift and factor once for static codes, whose factors are their steps, and once for dynamic ones.
``search`` takes the static form where its predicted noise is at most 0.5 dB above that of the dynamic one, ``search-static``
already where it is at most 0.5 dB above that of dynamic codes without shift and factor, which are what there is without a
calibration. Where it is not taken, the site stays dynamic. Rows of the input count as in ``observers.balanced``, for the noise
and for GPTQ's Hessian alike, so that the first token's outliers do not decide everything.
"""

from functools import partial

from fxquant.calibration.migration.balance import Balance, Balancing
from fxquant.calibration.observers import BalancedGram
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.recipes.base import Gathered, Recipe, Rounding
from fxquant.calibration.recipes.weights import sweep
from fxquant.calibration.site import INACCURATE, SiteCalibration
from fxquant.reference import SMALLEST

ROWS = 128  # of those that were kept, for the extents of tokens


def code(gathered: Gathered, prefers_static: bool, rounding: Rounding | None = sweep) -> SiteCalibration | None:
    """The site with the shift, factor and qparams of the search; None: its weight is rounded later."""
    scheme, seen = gathered.scheme, gathered.observers["balanced"]
    assert isinstance(seen, BalancedGram)
    if scheme.is_weight_only:
        return gathered.calibrated(rounding=rounding)
    rows = gathered.rows[:: max(1, len(gathered.rows) // ROWS)]
    linear = Balancing(gathered.weight, seen, rows, scheme.weight_bits, scheme.act_bits)
    note = None
    if not scheme.group:  # no kernel has groups and static inputs
        balance = linear.static()
        allowed = linear.plain_noise() if prefers_static else linear.dynamic().noise
        static = _qparams(balance, scheme.act_bits, allowed)
        if gathered.calibrated(static).is_accurate:
            return gathered.calibrated(static, rounding=rounding, shift=balance.shift)
        note = INACCURATE
    dynamic = linear.dynamic()
    return gathered.calibrated(factor=dynamic.factor, rounding=rounding, note=note, shift=dynamic.shift)


def _qparams(balance: Balance, bits: int, dynamic_noise: float) -> StaticQParams:
    """The steps as factor and scale, with the zero point in the middle of the codes."""
    scale = max(float(balance.factor.amax()), SMALLEST)
    return StaticQParams(balance.factor / scale, scale, 2 ** (bits - 1), 0.0, balance.noise, dynamic_noise)


OBSERVES = ("balanced", "rows")
SEARCH = Recipe(
    "search", "ours: shift and factor of least predicted noise, then GPTQ", partial(code, prefers_static=False), OBSERVES
)
SEARCH_STATIC = Recipe(
    "search-static",
    "ours: the search, static where that is as good as no search",
    partial(code, prefers_static=True),
    OBSERVES,
)
