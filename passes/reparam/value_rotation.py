"""linear(merge(p · heads(linear(x, W, b))), U, c)  →  linear(merge(p · heads(linear(x, RᵀW, Rᵀb))), UR, c)

Attention mixes tokens and never channels, so R, the same for every head, passes from the value rows to the columns of the
output linear: QuaRot's and SpinQuant's R2, which costs nothing at run time. As in ``rotation``, the columns of the matrix
that is handed over may have any length.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.reparam import value_scale
from fxquant.passes.reparam.legality import has_size
from fxquant.passes.reparam.rotation import ORTHOGONAL, columns, is_orthogonal
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples

pattern, repeated = value_scale.pattern, value_scale.repeated
HEAD = "R must be a square matrix of a head's features, in the dtype of the weights"


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield from value_scale.legal(m)
    yield HEAD, has_size(m.rotation, m.split[-1], m.split[-1]) and m.rotation.dtype == m.weight.dtype
    yield ORTHOGONAL, is_orthogonal(m.data("rotation"))


def by_head(value: Tensor, rotation: Tensor) -> Tensor:
    """R at the features [..., h d] of every head."""
    return torch.reshape(columns(torch.reshape(value, [-1, rotation.shape[0]]), rotation), value.shape)


def rewrite(weight: Tensor, bias: Tensor | None, out_weight: Tensor, rotation: Tensor, **unused: Any) -> dict[str, Tensor]:
    changed = {"weight": by_head(weight.t(), rotation).t(), "out_weight": by_head(out_weight, rotation)}
    return changed if bias is None else changed | {"bias": by_head(bias, rotation)}


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={**value_scale.SHAPES, "rotation": "d d"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={**value_scale.NEAR_MISSES, HEAD: {"rotation": "e m"}, ORTHOGONAL: {"rotation": "d d"}},
    spellings=(repeated,),
    samples=Samples({**value_scale.VALUES, "rotation": "orthonormal"}, scale=(0.1, 1.0)),
    frozen=value_scale.WEIGHTS,
    reweights=True,
    vectors=("rotation",),
    module=__name__,
)
