"""linear(layer_norm(x, γ, β), W, b)  →  linear(layer_norm(x, γ/r, (β + s·d)/r), W·r, b - W (s·d))

RepQ-ViT: with r = s/s̃ and d = z - z̃, a scale s and zero point z of each channel become one s̃, z̃ for the tensor, with the
very same codes. That needs whole zero points; the z̃ of the reference code, a mean that is not rounded, is refused.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import POSITIVE, VECTOR, WHOLE, are_positive, are_whole, has_size
from fxquant.passes.reparam.norms import NEAR_MISSES, SHAPES, SPELLINGS, WEIGHTS, legal
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples, Sizes

pattern = SPELLINGS[0]  # RMSNorm has no β to take up a zero point
_SCALARS = "the tensor's scale and zero point must have one value each"


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield from legal(m)
    yield VECTOR, all(has_size(v, *m.size) and v.dtype == m.weight.dtype for v in (m.scale, m.zero_point))
    yield _SCALARS, all(has_size(v, 1) for v in (m.tensor_scale, m.tensor_zero_point))
    yield POSITIVE, are_positive([_ratio(m.data("scale"), m.data("tensor_scale"))])
    yield WHOLE, are_whole(m.data(name) for name in ("zero_point", "tensor_zero_point"))


def _ratio(scale: Tensor | None, tensor_scale: Tensor | None) -> Tensor | None:
    return None if scale is None or tensor_scale is None else scale / tensor_scale


def rewrite(
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    tensor_scale: Tensor,
    tensor_zero_point: Tensor,
    **unused: Any,
) -> dict[str, Tensor]:
    ratio, shift = scale / tensor_scale, scale * (zero_point - tensor_zero_point)
    moved = torch.matmul(weight, shift)
    return {
        "gamma": 1.0 / ratio if gamma is None else gamma / ratio,
        "beta": (shift if beta is None else beta + shift) / ratio,
        "weight": weight * ratio,
        "bias": -moved if bias is None else bias - moved,
    }


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={**SHAPES, "scale": "n", "zero_point": "n", "tensor_scale": "one", "tensor_zero_point": "one"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        **NEAR_MISSES,
        VECTOR: {"scale": "k"},
        _SCALARS: {"tensor_scale": "n"},
        POSITIVE: {"scale": torch.zeros(5)},
        WHOLE: {"tensor_zero_point": torch.tensor([8.6667])},
    },
    samples=Samples(
        {
            "size": Sizes("n"),
            "eps": 1e-5,
            "scale": "positive",
            "tensor_scale": "positive",
            "zero_point": "integer",
            "tensor_zero_point": "integer",
        }
    ),
    frozen=WEIGHTS,
    reweights=True,
    joint=True,
    vectors=("scale", "zero_point", "tensor_scale", "tensor_zero_point"),
    module=__name__,
)
