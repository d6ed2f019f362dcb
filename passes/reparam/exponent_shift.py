"""linear(layer_norm(x, γ, β), W, b)  →  linear(layer_norm(x, γ·2^e, β·2^e), W·2^-e, b)

A whole exponent e of each channel. LLM-FP4 shifts its exponent bias before the linear this way (e = β_c); the power-of-two
factor of FQ-ViT is the same with e = -α_c. The result has the same bits as long as nothing over- or underflows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import VECTOR, WHOLE, are_whole, has_size
from fxquant.passes.reparam.norms import NEAR_MISSES, SHAPES, SPELLINGS, WEIGHTS, legal
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples, Sizes

pattern, root_mean_square = SPELLINGS
MAX_EXPONENT = 15  # what an E4 format can shift by; float32 is far from over- and underflow
_RANGE = f"exponents must lie between -{MAX_EXPONENT} and {MAX_EXPONENT}"


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield from legal(m)
    exponents = m.data("exponent")
    yield VECTOR, has_size(m.exponent, *m.size) and m.exponent.dtype == m.weight.dtype
    yield WHOLE, are_whole([exponents])
    yield _RANGE, exponents is None or bool((exponents.abs() <= MAX_EXPONENT).all())


def rewrite(gamma: Tensor | None, beta: Tensor | None, weight: Tensor, exponent: Tensor, **unused: Any) -> dict[str, Tensor]:
    up = torch.exp2(exponent)
    changed = {"gamma": up if gamma is None else gamma * up, "weight": weight * torch.exp2(-exponent)}
    return changed if beta is None else changed | {"beta": beta * up}


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={**SHAPES, "exponent": "n"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        **NEAR_MISSES,
        VECTOR: {"exponent": "k"},
        WHOLE: {"exponent": torch.full((5,), 0.5)},
        _RANGE: {"exponent": torch.full((5,), 16.0)},
    },
    spellings=(root_mean_square,),
    samples=Samples({"size": Sizes("n"), "eps": 1e-5, "exponent": "integer"}),
    frozen=WEIGHTS,
    reweights=True,
    joint=True,
    vectors=("exponent",),
    module=__name__,
)
