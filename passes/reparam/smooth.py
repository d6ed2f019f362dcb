"""linear(layer_norm(x, γ, β), W, b)  →  linear(layer_norm(x, γ/f, β/f), W·f, b)

SmoothQuant: a factor f > 0 of each channel moves outliers of the activations into the weights. The factor comes from a
calibration; it may hold that of SmoothQuant, SmoothQuant+, AWQ or FireQ alike. All linears that read the norm share it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import POSITIVE, VECTOR, are_positive, has_size
from fxquant.passes.reparam.norms import NEAR_MISSES, SHAPES, SPELLINGS, WEIGHTS, legal
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples, Sizes

pattern, root_mean_square = SPELLINGS


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield from legal(m)
    yield VECTOR, has_size(m.factor, *m.size) and m.factor.dtype == m.weight.dtype
    yield POSITIVE, are_positive([m.data("factor")])


def rewrite(gamma: Tensor | None, beta: Tensor | None, weight: Tensor, factor: Tensor, **unused: Any) -> dict[str, Tensor]:
    changed = {"gamma": 1.0 / factor if gamma is None else gamma / factor, "weight": weight * factor}
    return changed if beta is None else changed | {"beta": beta / factor}


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={**SHAPES, "factor": "n"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        **NEAR_MISSES,
        VECTOR: {"factor": "k"},
        POSITIVE: {"factor": torch.zeros(5)},
    },
    spellings=(root_mean_square,),
    samples=Samples({"size": Sizes("n"), "eps": 1e-5, "factor": "positive"}),
    frozen=WEIGHTS,
    reweights=True,
    joint=True,
    vectors=("factor",),
    module=__name__,
)
