"""attention(heads(linear(x, W, b)), k, v, scale=s)  →  attention(heads(linear(x, W·s, b·s)), k, v, scale=1)

The scale of the scores is a constant factor of the queries, and so of the rows that make them: one multiplication less a
score, and codes of q that already carry it. Without a scale the operator takes 1/√d.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.reparam.heads import attend, heads
from fxquant.passes.reparam.legality import FROZEN, FULL, UNTIED, are_frozen, are_full, are_untied
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples, Sizes

_NUMBER = "the scale must be a number other than 1, or 1/√d with a known d"


def pattern(
    x: Any,
    weight: Any,
    bias: Any,
    split: Any,
    k: Any,
    v: Any,
    mask: Any,
    dropout: Any,
    causal: Any,
    scale: Any,
    grouped: Any,
) -> Any:
    return attend(heads(x, weight, bias, split), k, v, mask, dropout, causal, scale, grouped)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield FROZEN, are_frozen(m, "weight", "bias")
    yield FULL, are_full(m, "x", "weight", "bias", "k", "v")
    yield UNTIED, are_untied(m, "weight", "bias")
    yield _NUMBER, isinstance(_scale(m.scale, m.k), float) and m.scale != 1.0


def _scale(scale: float | None, k: Tensor) -> float | None:
    if scale is not None:
        return scale
    return float(k.shape[-1] ** -0.5) if isinstance(k.shape[-1], int) else None


def rewrite(weight: Tensor, bias: Tensor | None, k: Tensor, scale: float | None, **unused: Any) -> dict[str, Any]:
    factor = _scale(scale, k) or 1.0
    changed = {"weight": weight * factor, "scale": 1.0}
    return changed if bias is None else changed | {"bias": bias * factor}


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b n k", "weight": "h*d k", "bias": "h*d", "k": "b h m d", "v": "b h m e"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        FROZEN: {"weight": "h*d k"},
        FULL: dict.fromkeys(("x", "weight", "bias", "k", "v"), torch.bfloat16),
        UNTIED: {"weight": "tied"},
        _NUMBER: {"scale": 1.0},
    },
    samples=Samples(
        {
            "split": Sizes("b n h d"),
            "mask": None,
            "dropout": 0.0,
            "causal": False,
            "scale": 0.35,
            "grouped": False,
        },
        scale=(0.1, 1.0),
    ),
    frozen=("weight", "bias"),
    reweights=True,
)
