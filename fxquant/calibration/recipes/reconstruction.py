"""Weights rounded behind the quantized part of the model: in closed form, and learned block by block.

Activations are coded as by ``minmax``, those of ``reconstruct`` as by ``search``, of ``reconstruct-static`` as by
``search-static``. The batches are kept, and the model has to be one graph.
"""

from dataclasses import replace
from functools import partial

from fxquant.calibration.recipes import search
from fxquant.calibration.recipes.base import Gathered, Recipe, static_or_dynamic
from fxquant.calibration.recipes.weights import SWEEP
from fxquant.calibration.reconstruction.block import Learning
from fxquant.calibration.reconstruction.sequence import Reconstruction
from fxquant.calibration.reconstruction.tuning import Tuning
from fxquant.calibration.rounding import gptaq, refitted
from fxquant.calibration.site import INACCURATE, SiteCalibration

LAYERWISE = Learning(drop=0.0)
QDROPPED = Learning(drop=0.5)


def activations(gathered: Gathered) -> SiteCalibration | None:
    """Min-max activations, static or dynamic, or none; the weight is still to be rounded."""
    if gathered.scheme.is_weight_only:
        return gathered.calibrated()
    known = static_or_dynamic(gathered)
    return known if known is None or known.is_accurate else gathered.calibrated(note=INACCURATE)


GPTAQ = Recipe(
    "gptaq",
    "GPTAQ, arXiv 2504.02692: GPTQ behind the quantized prefix for the float output, act-order and scales as of gptq (ours)",
    activations,
    follows=Reconstruction(partial(gptaq.round_weight, options=SWEEP)),
)
SEQUENTIAL = Recipe(
    "sequential",
    "ours: GPTQ behind the quantized prefix against the float output and residual, scales fitted to the codes",
    activations,
    follows=Reconstruction(refitted.round_weight),
)
RECONSTRUCT = Recipe(
    "reconstruct",
    "ours: the search's activations, weights as of sequential, then all scales tuned against what the float model returns",
    partial(search.code, prefers_static=False, rounding=None),
    search.OBSERVES,
    follows=Reconstruction(refitted.round_weight, tuning=Tuning()),
)
RECONSTRUCT_STATIC = replace(
    RECONSTRUCT,
    name="reconstruct-static",
    source="ours: reconstruct with the activations of search-static",
    code=partial(search.code, prefers_static=True, rounding=None),
)
ADAROUND = Recipe(
    "adaround",
    "AdaRound, arXiv 2004.10568: the linears that read one value and what follows them, started from sequential's codes",
    activations,
    follows=Reconstruction(refitted.round_weight, LAYERWISE, by_stage=True),
)
QDROP = Recipe(
    "qdrop",
    "QDrop, arXiv 2203.05740: AdaRound by blocks, inputs and activations mixed with float, started from sequential's codes",
    activations,
    follows=Reconstruction(refitted.round_weight, QDROPPED),
)
