"""FPQ (LLM-FP4): weight and input of every linear as floating-point numbers, splits and biases searched.

The schemes are those of integers: ``w4a4`` gives both operands 4 bits, of which the search makes sign, exponent and mantissa.
No kernel reads them: the specification runs in float, compiled, and the report says so. Differences from the publication: a
linear applies the pre-shifts of its input itself, whatever comes before it; one round of search instead of three, on 128 rows;
errors are not weighted by gradients; attention stays float. ``searches.llm_fp4`` has the rest.
"""

from dataclasses import replace

import torch

from fxquant.calibration.recipes.base import Gathered, Recipe
from fxquant.calibration.searches import llm_fp4
from fxquant.calibration.searches.llm_fp4 import CHANNELS
from fxquant.calibration.site import SiteCalibration, StaticCoding, WeightCodes, weight_digest
from fxquant.coding import Coding
from fxquant.granularity import PerChannel

ROWS = 128  # candidates are a few hundred products


def _fpq(gathered: Gathered) -> SiteCalibration | None:
    """Weights alone are left to the nearest: the method is about both."""
    if gathered.scheme.is_weight_only:
        return None
    site, scheme, weight = gathered.site, gathered.scheme, gathered.weight
    x, w = llm_fp4(site.name, gathered.rows[:ROWS], weight, (scheme.weight_bits, scheme.act_bits), rounds=1)
    coded = gathered.calibrated(StaticCoding(Coding(x.format, CHANNELS), x.qparams), note=f"weight: {w.format.name}")
    codes, scale = w.format.quantize(weight, w.qparams).to(torch.uint8), w.qparams["scale"].reshape(-1)
    return replace(coded, codes=WeightCodes(codes, scale, weight_digest(site.weight), coding=Coding(w.format, PerChannel(0))))


FPQ = Recipe("fpq", "LLM-FP4, arXiv 2310.16836: searched floating-point formats, pre-shifted exponent biases", _fpq, ("rows",))
