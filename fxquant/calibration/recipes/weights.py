"""Weights rounded against the data: GPTQ and AWQ, with factors that move outliers of the input into the weight.

Activations are coded as by ``minmax`` unless a factor is moved; then they stay dynamic. Every linear has a factor of its own,
which is divided out before it is coded: nothing else of the model changes, whatever stands before the linear.
"""

from functools import partial

import torch
from torch import Tensor

from fxquant.calibration.migration import awq as awq_migration
from fxquant.calibration.migration import smoothquant
from fxquant.calibration.recipes.base import Gathered, Recipe, static_or_dynamic
from fxquant.calibration.rounding import awq, gptq, mse
from fxquant.calibration.rounding.grid import decode
from fxquant.calibration.rounding.nearest import round_weight as nearest
from fxquant.calibration.seen import Seen
from fxquant.calibration.site import SiteCalibration
from fxquant.reference import fake_quant_per_token

ALPHA = 0.5  # SmoothQuant, for all but Llama-like models
ALPHAS = (0.3, 0.5, 0.65, 0.8, 0.9)  # that the search tries besides no factor at all
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
        value = decode(*nearest(gathered.weight * factor, bits, group), group) / factor
        return _output_error(gathered, gathered.rows, value)

    alpha = min((i / 20 for i in range(21)), key=error)
    return gathered.calibrated(factor=smoothquant.factor(gathered.seen, [gathered.weight], alpha))


def _awq(gathered: Gathered) -> SiteCalibration | None:
    bits, group = gathered.scheme.weight_bits, gathered.scheme.group
    value = lambda weight: decode(*nearest(weight, bits, group), group)  # noqa: E731 - one expression, used once
    factor = awq_migration.factor(gathered.seen, [gathered.weight], value)
    return gathered.calibrated(factor=factor, rounding=awq.round_weight)


def _search(gathered: Gathered) -> SiteCalibration | None:
    """Ours: of no factor and five of SmoothQuant's the one with the least error of the output, then GPTQ."""
    if gathered.scheme.is_weight_only:
        return gathered.calibrated(rounding=sweep)
    factors = [torch.ones(gathered.site.shape[1])]
    factors += [smoothquant.factor(gathered.seen, [gathered.weight], alpha) for alpha in ALPHAS]
    best = min(factors, key=partial(_coded_error, gathered))
    return gathered.calibrated(factor=best if best is not factors[0] else None, rounding=sweep)


def _coded_error(gathered: Gathered, factor: Tensor) -> float:
    """Of the output, with the input and the nearest weight coded after a factor was moved."""
    coded = fake_quant_per_token(gathered.rows / factor, gathered.scheme.act_bits) * factor
    value = decode(*nearest(gathered.weight * factor, gathered.scheme.weight_bits), 0) / factor
    return _output_error(gathered, coded, value)


def _output_error(gathered: Gathered, rows: Tensor, value: Tensor) -> float:
    wanted = gathered.rows @ gathered.weight.T
    return float((rows @ value.T - wanted).square().sum())


GPTQ = Recipe("gptq", "GPTQ, arXiv 2210.17323, with act-order and mean-squared scales", _gptq, ("gram",))
SMOOTHQUANT = Recipe("smoothquant", "SmoothQuant, arXiv 2211.10438, α = 1/2", _smoothquant, ("moments",))
SMOOTHQUANT_PLUS = Recipe("smoothquant+", "SmoothQuant+, arXiv 2312.03788", _smoothquant_plus, ("moments", "rows"))
AWQ = Recipe("awq", "AWQ, arXiv 2306.00978: scale and clip search on each linear alone", _awq, ("gram", "moments"))
SEARCH = Recipe("search", "ours: SmoothQuant's factor by output error, then GPTQ", _search, ("gram", "moments", "rows"))
