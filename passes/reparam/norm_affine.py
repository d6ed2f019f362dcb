"""linear(layer_norm(x, γ, β), W, b)  →  linear(layer_norm(x), W·γ, W β + b)

The norm then leaves every channel at unit variance, so that one activation scale serves them all. All linears that read
the norm take up γ and β, or none does. RMSNorm has γ alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.reparam.norms import NEAR_MISSES, SHAPES, SPELLINGS, WEIGHTS, legal
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples, Sizes

pattern, root_mean_square = SPELLINGS
_AFFINE = "the norm must have γ: there is nothing to fold"


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield _AFFINE, m.gamma is not None
    yield from legal(m)


def rewrite(gamma: Tensor, beta: Tensor | None, weight: Tensor, bias: Tensor | None, **unused: Any) -> dict[str, Tensor | None]:
    changed: dict[str, Tensor | None] = {"gamma": None, "weight": weight * gamma}
    if beta is not None:
        shift = torch.matmul(weight, beta)
        changed |= {"beta": None, "bias": shift if bias is None else shift + bias}
    return changed


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes=SHAPES,
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        _AFFINE: {"gamma": None},
        **NEAR_MISSES,
    },
    spellings=(root_mean_square,),
    samples=Samples({"size": Sizes("n"), "eps": 1e-5}),
    frozen=WEIGHTS,
    reweights=True,
    joint=True,
    module=__name__,
)
