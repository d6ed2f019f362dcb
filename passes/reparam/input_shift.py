"""linear(x - ς, W, b)  →  linear(x, W, b - ς·Σ W)

AdaLog codes GELU's output plus ς = 0.1699..., which is never negative, and takes ς off again behind the codes. The bias takes
it off for nothing. W is the weight as the linear reads it, rounded or not: what is folded follows it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import FROZEN, FULL, are_frozen, are_full
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples

GELU_SHIFT = 0.16997124254703522  # minus the minimum of GELU
_NUMBER = "ς must be a number"


def pattern(x: Any, weight: Any, bias: Any, shift: Any) -> Any:
    return linear(x - shift, weight, bias)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield _NUMBER, isinstance(m.shift, (int, float)) and not isinstance(m.shift, bool)
    yield FROZEN, are_frozen(m, "weight", "bias")
    yield FULL, are_full(m, "x", "weight", "bias")


def rewrite(x: Tensor, weight: Tensor, bias: Tensor | None, shift: float) -> Tensor:
    moved = torch.sum(weight, 1) * shift
    return linear(x, weight, -moved if bias is None else bias - moved)


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b n", "weight": "k n", "bias": "k"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        _NUMBER: {"shift": "b n"},
        FROZEN: {"weight": "k n"},
        FULL: {"x": torch.bfloat16, "weight": torch.bfloat16, "bias": torch.bfloat16},
    },
    samples=Samples({"shift": GELU_SHIFT}),
    frozen=("weight", "bias"),
)
