"""Weights rounded against the data: GPTQ and AWQ, with factors that move outliers of the input into the weight.

Activations are coded as by ``minmax`` unless a factor is moved; then they stay dynamic. Every linear has a factor of its own,
which is divided out before it is coded: nothing else of the model changes, whatever stands before the linear.
"""

from torch import Tensor

from fxquant.calibration.migration import awq as awq_migration
from fxquant.calibration.migration import smoothquant, smoothquant_plus
from fxquant.calibration.recipes.base import Gathered, Recipe, static_or_dynamic
from fxquant.calibration.rounding import awq, gptq, mse
from fxquant.calibration.rounding.nearest import round_weight as nearest
from fxquant.calibration.seen import Seen
from fxquant.calibration.site import SiteCalibration
from fxquant.reference import dequantize_weight

ALPHA = 0.5  # SmoothQuant, for all but Llama-like models
SWEEP = gptq.Options(act_order=True, static_groups=True, scale_of=mse.choose_scale)


def sweep(weight: Tensor, bits: int, group: int, seen: Seen) -> tuple[Tensor, Tensor]:
    """GPTQ by falling diagonal, with the scales of least squared error: the best of those compared on MiniLM and SmolLM2."""
    return gptq.round_weight(weight, bits, group, seen, SWEEP)


def _gptq(gathered: Gathered) -> SiteCalibration | None:
    return static_or_dynamic(gathered, sweep)


def _smoothquant(gathered: Gathered) -> SiteCalibration | None:
    if gathered.scheme.is_weight_only:
        return None
    return gathered.calibrated(factor=smoothquant.factor(gathered.seen, [gathered.weight], ALPHA))


def _smoothquant_plus(gathered: Gathered) -> SiteCalibration | None:
    """The α of the least error, for each linear alone: the publication has one for a model."""
    bits, group = gathered.scheme.weight_bits, gathered.scheme.group

    def error(alpha: float) -> float:
        factor = smoothquant.factor(gathered.seen, [gathered.weight], alpha)
        value = dequantize_weight(*nearest(gathered.weight * factor, bits, group), group) / factor
        return _output_error(gathered, gathered.rows, value)

    alpha = smoothquant_plus.search(error).alpha
    return gathered.calibrated(factor=smoothquant.factor(gathered.seen, [gathered.weight], alpha))


def _awq(gathered: Gathered) -> SiteCalibration | None:
    bits, group = gathered.scheme.weight_bits, gathered.scheme.group
    value = lambda weight: dequantize_weight(*nearest(weight, bits, group), group)  # noqa: E731 - one expression, used once
    factor = awq_migration.factor(gathered.seen, [gathered.weight], value)
    return gathered.calibrated(factor=factor, rounding=awq.round_weight)


def _output_error(gathered: Gathered, rows: Tensor, value: Tensor) -> float:
    wanted = gathered.rows @ gathered.weight.T
    return float((rows @ value.T - wanted).square().sum())


GPTQ = Recipe("gptq", "GPTQ, arXiv 2210.17323, with act-order and mean-squared scales", _gptq, ("gram",))
SMOOTHQUANT = Recipe("smoothquant", "SmoothQuant, arXiv 2211.10438, α = 1/2", _smoothquant, ("moments",))
SMOOTHQUANT_PLUS = Recipe("smoothquant+", "SmoothQuant+, arXiv 2312.03788", _smoothquant_plus, ("moments", "rows"))
AWQ = Recipe("awq", "AWQ, arXiv 2306.00978: scale and clip search on each linear alone", _awq, ("gram", "moments"))
