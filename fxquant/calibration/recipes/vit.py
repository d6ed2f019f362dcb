"""Published quantizers of vision transformers: the inputs of linears by where they come from, weights, and attention.

| method | after a norm | after GELU | other inputs | weights |
|---|---|---|---|---|
| fq-vit | power-of-two factor | percentile | percentile | extent |
| ptq4vit | grid by x Wᵀ | twin uniform | grid by x Wᵀ | grid by x Wᵀ, one scale |
| repq | per channel, as one | MSE percentile | MSE percentile | MSE percentile |
| repquant | the same with learned dual clipping | MSE percentile | MSE percentile | as sequential |
| i&s | per channel, as one | MSE percentile | MSE percentile | tuned, MSE percentile of nine |
| dopq | per channel, as one by the median | MSE percentile | MSE percentile | MSE percentile |
| adalog | per channel by FPCS, as one | shifted AdaLog | FPCS by x Wᵀ | scales by x Wᵀ |

Attention: ``recipes.attention``; LayerNorm, softmax and GELU stay float. vit-quantizers section 14, with these differences.
Weights have the symmetric codes of the kernels, where the publications mostly have affine ones. Activations are coded from
float inputs, none behind the quantized layers before it. FPCS tries 16 zero points around the middle, which no one-sided
input has at 6 bits and more: MSE percentiles (after norms) or the extent stay where they are better. ptq4vit's errors are not
weighted by gradients, and its linears have one round of search instead of three. i&s has the three stages of
``reconstruction.sos``, repquant the clips of ``reconstruction.dual_clip`` and then weights behind the quantized prefix; both
keep the batches, and the model has to be one graph. DopQ-ViT's publication reconstructs too, but how is not known: its figures
are out of reach. Unconfirmed: RepQuant's formulas of dual clipping, and its weights, which are those of ``sequential``; and
DopQ-ViT's rule for the zero point.
"""

from collections.abc import Callable
from functools import partial

import torch

from fxquant.calibration.channel_coding import ChannelCoding, Middle
from fxquant.calibration.observers import QuantileSketch
from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.recipes.base import Gathered, Recipe, Rounding
from fxquant.calibration.recipes.gelu import choose_after_gelu
from fxquant.calibration.recipes.norm_inputs import percentile_channels, power_of_two_factors
from fxquant.calibration.recipes.ranges import FRACTION, per_tensor
from fxquant.calibration.reconstruction.dual_clip import Clipping
from fxquant.calibration.reconstruction.sequence import Reconstruction
from fxquant.calibration.reconstruction.sos import Stages
from fxquant.calibration.rounding import hessian_weighted, percentile, refitted
from fxquant.calibration.rounding.grid import encode
from fxquant.calibration.searches import (
    Candidates,
    Product,
    TensorMetric,
    alternate,
    choose,
    fpcs,
    half_step_start,
    min_max,
    mse_percentile,
    scale_grid,
)
from fxquant.calibration.searches import percentile as quantiles
from fxquant.calibration.searches.ranges import IAS_WEIGHT_FRACTIONS
from fxquant.calibration.site import SiteCalibration
from fxquant.formats import Uniform
from fxquant.granularity import PerChannel, PerTensor

NORMS = ("layer_norm", "rms_norm")
JUDGED_ROWS = 128  # of the rows: products are made a few hundred times
OBSERVED = ("many rows",)


def _fq_vit(gathered: Gathered) -> SiteCalibration:
    if gathered.site.comes_from in NORMS:
        return gathered.calibrated(power_of_two_factors(gathered.rows, gathered.scheme.act_bits))
    sketch = gathered.observers["quantiles"]
    assert isinstance(sketch, QuantileSketch)
    choice = quantiles(sketch.samples(), Uniform(gathered.scheme.act_bits), FRACTION)
    return gathered.calibrated(per_tensor(gathered, choice.qparams))


def _ptq4vit(gathered: Gathered) -> SiteCalibration:
    """Weight, then input; where GELU comes before, the ratio of its twin steps follows."""
    site, bits = gathered.site.name, gathered.scheme
    rows, weight = gathered.rows[:JUDGED_ROWS], gathered.weight
    forms = Uniform(bits.act_bits, is_symmetric=True), Uniform(bits.weight_bits, is_symmetric=True)
    samples = Samples.of(site, gathered.rows), Samples.of(site, weight)
    starts = [half_step_start(*pair) for pair in zip(samples, forms, strict=True)]
    x, w = alternate(
        Product(site, rows, weight, PerTensor(), PerTensor()),
        (min_max(samples[0], forms[0]), min_max(samples[1], forms[1])),
        lambda metric: scale_grid(metric, forms[0], starts[0]),
        lambda metric: scale_grid(metric, forms[1], starts[1]),
        rounds=1,
    )
    half = torch.tensor([[float(forms[0].qmax)]])
    uniform = per_tensor(gathered, {"scale": x.qparams["scale"], "zero_point": half})
    is_twin = gathered.site.comes_from == "gelu"
    one = w.qparams["scale"].reshape(1).expand(len(weight)) * (1.0 if is_twin else uniform.scale)
    return gathered.calibrated(
        choose_after_gelu(site, rows, weight, "ptq4vit", bits.act_bits) if is_twin else uniform,
        rounding=lambda value, width, group, seen: (encode(value, one, width, group), one),
    )


def _repq(
    gathered: Gathered, rounding: Rounding | None = percentile.round_weight, middle: Middle = torch.mean
) -> SiteCalibration:
    if gathered.site.comes_from in NORMS:
        coding = percentile_channels(gathered.rows, gathered.scheme.act_bits)
        return _as_one(gathered, coding, rounding, middle)
    choice = mse_percentile(Samples.of(gathered.site.name, gathered.rows), Uniform(gathered.scheme.act_bits))
    return gathered.calibrated(per_tensor(gathered, choice.qparams), rounding=rounding)


def _adalog(gathered: Gathered) -> SiteCalibration:
    site, bits, rows = gathered.site, gathered.scheme.act_bits, gathered.rows
    if site.comes_from in NORMS:
        samples = Samples.of(site.name, rows, PerChannel(-1))
        found = fpcs(TensorMetric(samples), samples, Uniform(bits)).qparams
        coding = ChannelCoding(*(found[name].reshape(-1) for name in ("scale", "zero_point")))
        coding = percentile_channels(rows, bits).or_better(coding, rows, bits)
        return _as_one(gathered, coding, hessian_weighted.round_weight)
    few = rows[:JUDGED_ROWS]
    if site.comes_from == "gelu":
        static = choose_after_gelu(site.name, few, gathered.weight, "adalog", bits)
        return gathered.calibrated(static, rounding=hessian_weighted.round_weight)
    metric = Product(site.name, few, gathered.weight, PerTensor(), PerChannel(0)).metric("left")
    samples = Samples.of(site.name, rows)
    searched = fpcs(metric, samples, Uniform(bits))
    grids = [
        {name: value[None] for name, value in each.qparams.items()} for each in (searched, min_max(samples, Uniform(bits)))
    ]
    choice = choose(metric, [Candidates(Uniform(bits), grid) for grid in grids])
    return gathered.calibrated(per_tensor(gathered, choice.qparams), rounding=hessian_weighted.round_weight)


def _as_one(
    gathered: Gathered, coding: ChannelCoding, rounding: Rounding | None, middle: Middle = torch.mean
) -> SiteCalibration:
    static, shift = coding.as_one(gathered.scheme.act_bits, middle)
    return gathered.calibrated(static, shift=shift, rounding=rounding)


def _recipe(
    name: str, source: str, code: Callable[[Gathered], SiteCalibration], *more: str, follows: Reconstruction | None = None
) -> Recipe:
    """Weights alone are left to the nearest: these methods are about activations."""
    coded = lambda gathered: None if gathered.scheme.is_weight_only else code(gathered)  # noqa: E731 - one expression
    return Recipe(name, source, coded, (*OBSERVED, *more), codes_attention=True, follows=follows)


_ias_weight = partial(percentile.round_weight, fractions=IAS_WEIGHT_FRACTIONS)
_dual_clipped = Reconstruction(refitted.round_weight, clipping=Clipping())
FQ_VIT = _recipe("fq-vit", "FQ-ViT, arXiv 2111.13824", _fq_vit, "quantiles")
PTQ4VIT = _recipe("ptq4vit", "PTQ4ViT, arXiv 2111.12293", _ptq4vit)
REPQ = _recipe("repq", "RepQ-ViT, arXiv 2212.08254", _repq)
REPQUANT = _recipe("repquant", "RepQuant, arXiv 2402.05628", partial(_repq, rounding=None), follows=_dual_clipped)
IAS = _recipe(
    "i&s",
    "I&S-ViT, arXiv 2311.10126",
    partial(_repq, rounding=_ias_weight),
    follows=Reconstruction(_ias_weight, learning=Stages()),
)
DOPQ = _recipe("dopq", "DopQ-ViT, arXiv 2408.03291, without reconstruction", partial(_repq, middle=torch.median))
ADALOG = _recipe("adalog", "AdaLog, arXiv 2407.12951, without reconstruction", _adalog, "gram")
VIT_RECIPES = (FQ_VIT, PTQ4VIT, REPQ, REPQUANT, IAS, DOPQ, ADALOG)
