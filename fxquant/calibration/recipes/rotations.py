"""QuaRot: the residual stream and the heads of values rotated by random Hadamard matrices, then GPTQ; activations dynamic.

The rotations are those that cost nothing at run time, but for two turns of the stream beside a tied embedding: the rules
``rotation`` (R1) and ``value_rotation`` (R2), after norms gave γ and β to the linears that read them. What QuaRot does at run
time is left out: the Hadamard transforms before the down linear, across heads, and of queries and keys, which stay float
here. Activations are affine and not clipped, and weights have GPTQ's order and scales of the recipe ``gptq``. The other
differences are those of ``migration.hadamard``: Paley's matrices, and blocks where there is none. A model of which no stream
can be rotated is refused.

``search-rotated`` and ``reconstruct-rotated`` are ours: the same rotations, then ``search`` or ``reconstruct``, whose factors
reach the inputs that no rotation does.
"""

from dataclasses import replace

from torch import fx

from fxquant.calibration.files import Vectors
from fxquant.calibration.migration.hadamard import signed
from fxquant.calibration.recipes.base import Gathered, Recipe
from fxquant.calibration.recipes.reconstruction import RECONSTRUCT
from fxquant.calibration.recipes.search import SEARCH
from fxquant.calibration.recipes.weights import sweep
from fxquant.calibration.site import SiteCalibration
from fxquant.passes.reparam import rotation, value_rotation
from fxquant.passes.reparam.stream import find_streams
from fxquant.sites import find_sites

FOLDS = ("layer_scale", "norm_affine")


def rotations(gm: fx.GraphModule, seed: int) -> Vectors:
    """A matrix for every residual stream, at its first norm, and for the values of every attention."""
    sites = find_sites(gm.graph)
    streams = {
        sites[min(stream.around & sites.keys())][0].name: {"rotation": signed(stream.width, seed)}
        for stream in find_streams(gm.graph)
    }
    heads = {
        found[-1].name: {"rotation": signed(node.args[2].meta["val"].shape[-1], seed)}  # type: ignore[union-attr]
        for node, found in sites.items()
        if found[-1].kind == "attention.pv"
    }
    return {rotation.RULE.name: streams, value_rotation.RULE.name: heads}


def _quarot(gathered: Gathered) -> SiteCalibration | None:
    note = None if gathered.scheme.is_weight_only else "dynamic: QuaRot's activations are"
    return gathered.calibrated(rounding=sweep, note=note)


QUAROT = Recipe(
    "quarot",
    "QuaRot, arXiv 2404.00456: the rotations without cost at run time, then GPTQ",
    _quarot,
    ("gram",),
    folds=FOLDS,
    vectors=rotations,
)
SEARCH_ROTATED = replace(
    SEARCH, name="search-rotated", source="ours: QuaRot's rotations, then the search", folds=FOLDS, vectors=rotations
)
RECONSTRUCT_ROTATED = replace(
    RECONSTRUCT,
    name="reconstruct-rotated",
    source="ours: QuaRot's rotations, then reconstruct",
    folds=FOLDS,
    vectors=rotations,
)
