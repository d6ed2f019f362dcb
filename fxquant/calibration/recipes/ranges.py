"""Static ranges for activations, weights to the nearest: min-max, moving average, percentile, MSE, OMSE, KL.

``minmax`` has one step an input channel (the factor goes into the weight) and keeps a site dynamic where that is predicted to
be better. The others are as published: one range a tensor, always static. ``ema`` depends on the order of the batches.
``percentile`` takes the quantiles of everything that was seen; FQ-ViT's code averages those of batches with a momentum.
"""

import torch
from torch import Tensor

from fxquant.calibration.observers import EmaExtent, Histogram, QuantileSketch, Reservoir
from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.recipes.base import Gathered, Recipe, static_or_dynamic
from fxquant.calibration.rounding import mse as mse_rounding
from fxquant.calibration.searches import kl, mse_grid, omse, percentile
from fxquant.calibration.site import SiteCalibration
from fxquant.formats import QParams, Uniform

FRACTION = 0.99999  # FQ-ViT


def per_tensor(gathered: Gathered, qparams: QParams) -> StaticQParams:
    """Affine qparams of one block as those of a static linear; no noise is predicted."""
    scale, zero_point = (float(qparams[name].reshape(-1)[0]) for name in ("scale", "zero_point"))
    return StaticQParams(torch.ones(gathered.site.shape[1]), scale, int(zero_point), 0.0, 0.0, 0.0)


def _percentile(gathered: Gathered) -> SiteCalibration | None:
    if gathered.scheme.is_weight_only:
        return None
    sketch = gathered.observers["quantiles"]
    assert isinstance(sketch, QuantileSketch)
    choice = percentile(sketch.samples(), Uniform(gathered.scheme.act_bits), FRACTION)
    return gathered.calibrated(per_tensor(gathered, choice.qparams))


def _ema(gathered: Gathered) -> SiteCalibration | None:
    if gathered.scheme.is_weight_only:
        return None
    average = gathered.observers["ema"]
    assert isinstance(average, EmaExtent)
    return gathered.calibrated(per_tensor(gathered, Uniform(gathered.scheme.act_bits).qparams(*average.extent())))


def _kl(gathered: Gathered) -> SiteCalibration | None:
    if gathered.scheme.is_weight_only:
        return None
    histogram = gathered.observers["histogram"]
    assert isinstance(histogram, Histogram)
    return gathered.calibrated(per_tensor(gathered, kl(histogram, Uniform(gathered.scheme.act_bits)).qparams))


def _omse(gathered: Gathered) -> SiteCalibration | None:
    if gathered.scheme.is_weight_only:
        return None
    choice = omse(Samples.of(gathered.site.name, gathered.rows), Uniform(gathered.scheme.act_bits))
    return gathered.calibrated(per_tensor(gathered, choice.qparams))


def _mse(gathered: Gathered) -> SiteCalibration | None:
    rounding = _nearest_mse
    if gathered.scheme.is_weight_only:
        return gathered.calibrated(rounding=rounding)
    rows = gathered.observers["rows"]
    assert isinstance(rows, Reservoir)
    choice = mse_grid(Samples.of(gathered.site.name, rows.items), Uniform(gathered.scheme.act_bits))
    return gathered.calibrated(per_tensor(gathered, choice.qparams), rounding=rounding)


def _nearest_mse(weight: Tensor, bits: int, group: int, seen: object) -> tuple[Tensor, Tensor]:
    return mse_rounding.round_weight(weight, bits, group)


MINMAX = Recipe("minmax", "one step an input channel, the best of five powers of its extent", static_or_dynamic)
PERCENTILE = Recipe("percentile", "FQ-ViT, arXiv 2111.13824: the quantiles 0.99999 and 0.00001", _percentile, ("quantiles",))
MSE = Recipe("mse", "the range and the scales of least squared error", _mse, ("rows",))
EMA = Recipe("ema", "FQ-ViT, arXiv 2111.13824: the moving average of the extents of batches, σ = 0.01", _ema, ("ema",))
KL = Recipe("kl", "TensorRT's way: the range of least KL divergence on a histogram", _kl, ("histogram",))
OMSE = Recipe("omse", "FQ-ViT, arXiv 2111.13824: both ends shrunk alike to the least squared error", _omse, ("rows",))
