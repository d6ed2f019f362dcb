"""attention(rope(heads(linear(x, W, b))), rope(heads(linear(y, U, c))), v)  →  the same with W·f, b·f, U/f, c/f

FireQ moves outliers of the keys into the queries. RoPE turns feature i with feature i + d/2, so both must have one factor:
then it passes through the rotation. With grouped heads each query head takes the factor of its group.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.reparam.heads import attend, for_groups, group_count, heads, repeat, rotate
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

_WEIGHTS = ("weight", "bias", "key_weight", "key_bias")
_GROUPS = "query features must be a multiple of key features, and RoPE must turn feature i with i + d/2"
_PAIRS = "the two features that RoPE turns together must have one factor"


def pattern(
    x: Any,
    weight: Any,
    bias: Any,
    split: Any,
    y: Any,
    key_weight: Any,
    key_bias: Any,
    key_split: Any,
    cos: Any,
    sin: Any,
    half: Any,
    end: Any,
    v: Any,
    mask: Any,
    dropout: Any,
    causal: Any,
    scale: Any,
    grouped: Any,
) -> Any:
    q = rotate(heads(x, weight, bias, split), cos, sin, half, end)
    k = rotate(heads(y, key_weight, key_bias, key_split), cos, sin, half, end)
    return attend(q, k, v, mask, dropout, causal, scale, grouped)


def repeated(
    x: Any,
    weight: Any,
    bias: Any,
    split: Any,
    y: Any,
    key_weight: Any,
    key_bias: Any,
    key_split: Any,
    wide: Any,
    narrow: Any,
    cos: Any,
    sin: Any,
    half: Any,
    end: Any,
    many_v: Any,
    mask: Any,
    dropout: Any,
    causal: Any,
    scale: Any,
) -> Any:
    q = rotate(heads(x, weight, bias, split), cos, sin, half, end)
    k = repeat(rotate(heads(y, key_weight, key_bias, key_split), cos, sin, half, end), wide, narrow)
    return attend(q, k, many_v, mask, dropout, causal, scale, False)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield FROZEN, are_frozen(m, *_WEIGHTS)
    yield FULL, are_full(m, "x", "y", *_WEIGHTS)
    yield UNTIED, are_untied(m, *_WEIGHTS)
    is_half = isinstance(m.half, int) and m.key_split[-1] == m.split[-1] == 2 * m.half
    yield _GROUPS, is_half and group_count(m.weight.shape[0], m.key_weight.shape[0]) is not None
    yield VECTOR, has_size(m.factor, m.key_weight.shape[0]) and m.factor.dtype == m.weight.dtype
    yield POSITIVE, are_positive([m.data("factor")])
    yield _PAIRS, _are_pairs(m.data("factor"), m.half)


def _are_pairs(factor: Tensor | None, half: int) -> bool:
    if factor is None:
        return True
    first, second = factor.reshape(-1, 2, half).unbind(1)
    return bool((first == second).all())


def rewrite(
    weight: Tensor,
    bias: Tensor | None,
    split: list[int],
    key_weight: Tensor,
    key_bias: Tensor | None,
    factor: Tensor,
    **unused: Any,
) -> dict[str, Tensor]:
    wide = for_groups(factor, split[-1], weight.shape[0] // key_weight.shape[0])
    changed = {"weight": weight * wide.unsqueeze(1), "key_weight": key_weight / factor.unsqueeze(1)}
    if bias is not None:
        changed["bias"] = bias * wide
    return changed if key_bias is None else changed | {"key_bias": key_bias / factor}


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={
        "x": "one n k",
        "weight": "g*h*d k",
        "bias": "g*h*d",
        "y": "one m k",
        "key_weight": "h*d k",
        "key_bias": "h*d",
        "cos": "n d",
        "sin": "n d",
        "v": "one h m e",
        "many_v": "one g*h m e",
        "factor": "h*d",
    },
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        FROZEN: {"weight": "g*h*d k"},
        FULL: dict.fromkeys(("x", "y", "weight", "bias", "key_weight", "key_bias", "cos", "sin", "v"), torch.bfloat16),
        UNTIED: {"key_weight": "tied"},
        _GROUPS: {"half": 1},
        VECTOR: {"factor": "h"},
        POSITIVE: {"factor": torch.zeros(8)},
        _PAIRS: {"factor": torch.arange(1.0, 9.0)},
    },
    spellings=(repeated,),
    samples=Samples(
        {
            "mask": None,
            "dropout": 0.0,
            "causal": False,
            "scale": 0.35,
            "grouped": True,
            "split": Sizes("one n g*h d"),
            "key_split": Sizes("one m h d"),
            "wide": Sizes("one h g m d"),
            "narrow": Sizes("one g*h m d"),
            "half": lambda sizes: sizes["d"] // 2,
            "end": 2**63 - 1,
            "factor": "pairs",
        },
        scale=(0.1, 1.0),
    ),
    frozen=_WEIGHTS,
    reweights=True,
    vectors=("factor",),
)
