"""linear(merge(p · heads(linear(x, W, b))), U, c)  →  linear(merge(p · heads(linear(x, W/f, b/f))), U·f, c)

Attention mixes tokens and never channels, so a factor f > 0 of each value channel passes from the value rows to the columns
of the output linear (SmoothQuant, AWQ). With grouped heads the columns of each query head take the factor of its group.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.reparam.heads import attend, for_groups, group_count, heads, merge, repeat
from fxquant.passes.reparam.legality import (
    FROZEN,
    FULL,
    POSITIVE,
    UNTIED,
    VECTOR,
    are_frozen,
    are_full,
    are_positive,
    are_untied,
    has_size,
)
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples, Sizes

WEIGHTS = ("weight", "bias", "out_weight", "out_bias")
GROUPS = "the output linear must read every value feature equally often, and the head size must be known"


def pattern(
    q: Any,
    k: Any,
    mask: Any,
    dropout: Any,
    causal: Any,
    scale: Any,
    grouped: Any,
    x: Any,
    weight: Any,
    bias: Any,
    split: Any,
    merged: Any,
    out_weight: Any,
    out_bias: Any,
) -> Any:
    v = heads(x, weight, bias, split)
    return merge(attend(q, k, v, mask, dropout, causal, scale, grouped), merged, out_weight, out_bias)


def repeated(
    q: Any,
    many_k: Any,
    mask: Any,
    dropout: Any,
    causal: Any,
    scale: Any,
    x: Any,
    weight: Any,
    bias: Any,
    split: Any,
    wide: Any,
    narrow: Any,
    merged: Any,
    out_weight: Any,
    out_bias: Any,
) -> Any:
    v = repeat(heads(x, weight, bias, split), wide, narrow)
    return merge(attend(q, many_k, v, mask, dropout, causal, scale, False), merged, out_weight, out_bias)


def legal(m: Match) -> Iterator[tuple[str, bool]]:
    """The conditions of everything that passes from the value rows to the output columns."""
    yield FROZEN, are_frozen(m, *WEIGHTS)
    yield FULL, are_full(m, "x", *WEIGHTS)
    yield UNTIED, are_untied(m, *WEIGHTS)
    is_split = isinstance(m.split[-1], int) and m.split[-1] > 0
    yield GROUPS, is_split and group_count(m.out_weight.shape[1], m.weight.shape[0]) is not None


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield from legal(m)
    yield VECTOR, has_size(m.factor, m.weight.shape[0]) and m.factor.dtype == m.weight.dtype
    yield POSITIVE, are_positive([m.data("factor")])


def rewrite(
    weight: Tensor, bias: Tensor | None, out_weight: Tensor, split: list[int], factor: Tensor, **unused: Any
) -> dict[str, Tensor]:
    groups = out_weight.shape[1] // weight.shape[0]
    changed = {
        "weight": weight / factor.unsqueeze(1),
        "out_weight": out_weight * for_groups(factor, split[-1], groups),
    }
    return changed if bias is None else changed | {"bias": bias / factor}


SHAPES = {
    "q": "one g*h n d",
    "k": "one h m d",
    "many_k": "one g*h m d",
    "x": "one m k",
    "weight": "h*d k",
    "bias": "h*d",
    "out_weight": "e g*h*d",
    "out_bias": "e",
}
VALUES = {
    "mask": None,
    "dropout": 0.0,
    "causal": False,
    "scale": 0.35,
    "grouped": True,
    "split": Sizes("one m h d"),
    "wide": Sizes("one h g m d"),
    "narrow": Sizes("one g*h m d"),
    "merged": Sizes("one n g*h*d"),
}
NEAR_MISSES: dict[str, dict[str, Any]] = {  # of ``legal``
    FROZEN: {"out_weight": "e g*h*d"},
    FULL: dict.fromkeys(("q", "k", "x", "weight", "bias", "out_weight", "out_bias"), torch.bfloat16),
    UNTIED: {"out_weight": "tied"},
    GROUPS: {"out_weight": "frozen e m*d", "split": [1, 5, 2, 4], "merged": [1, 2, 20], "q": "one g n d"},
}

RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={**SHAPES, "factor": "h*d"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        **NEAR_MISSES,
        VECTOR: {"factor": "h"},
        POSITIVE: {"factor": torch.zeros(8)},
    },
    spellings=(repeated,),
    samples=Samples({**VALUES, "factor": "positive"}, scale=(0.1, 1.0)),
    frozen=WEIGHTS,
    reweights=True,
    vectors=("factor",),
)
