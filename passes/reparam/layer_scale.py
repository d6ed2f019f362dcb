"""γ · linear(x, W, b)  →  linear(x, γ W, γ b)

LayerScale multiplies each output channel before the residual add: its factor belongs into the rows of the weight.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import FROZEN, FULL, UNTIED, are_frozen, are_full, are_untied, has_size
from fxquant.passes.rule import ALGEBRA, REAL, Rule

_VECTOR = "γ must have one value an output channel"


def pattern(x: Any, weight: Any, bias: Any, gamma: Any) -> Any:
    return linear(x, weight, bias) * gamma


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield _VECTOR, has_size(m.gamma, m.weight.shape[0])
    yield FROZEN, are_frozen(m, "weight", "bias", "gamma")
    yield FULL, are_full(m, "x", "weight", "bias", "gamma")
    yield UNTIED, are_untied(m, "weight", "bias", "gamma")


def rewrite(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor) -> Tensor:
    return linear(x, weight * gamma.unsqueeze(1), None if bias is None else bias * gamma)


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b n", "weight": "k n", "bias": "k", "gamma": "k"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        _VECTOR: {"gamma": 2.0},
        FROZEN: {"gamma": "k"},
        FULL: {"gamma": torch.float64},
        UNTIED: {"weight": "tied"},
    },
    frozen=("weight", "bias", "gamma"),
)
