"""einsum("...k,nk->...n", x, W)  →  linear(x, W)

The einsum spelling of a linear layer, with the weight stored either way round.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxquant.passes.match import Match
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples

_LINEAR = re.compile(r"([a-zA-Z]*|\.\.\.)([a-zA-Z]),([a-zA-Z])([a-zA-Z])->\1([a-zA-Z])")


def pattern(equation: Any, x: Any, weight: Any) -> Any:
    return torch.einsum(equation, [x, weight])


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "the right factor must be a weight: this is a product of two activations", m.is_frozen("weight")
    yield (
        "the equation must contract the last index of x with one index of the weight",
        _is_stored_out_in(m) is not None,
    )
    features = m.weight.shape[1 if _is_stored_out_in(m) else 0]
    yield "x and the weight must have the same size: einsum would repeat a size of 1", str(m.x.shape[-1]) == str(features)


def _is_stored_out_in(m: Match) -> bool | None:
    """True for W [out, in], False for W [in, out], None where the equation is no linear layer."""
    return stored_out_in(m.equation)


def stored_out_in(equation: str) -> bool | None:
    """The same for an equation's text."""
    found = _LINEAR.fullmatch(equation.replace(" ", ""))
    if found is None:
        return None
    lead, k, first, second, out = found.groups()
    if k == out or out in lead or k in lead:
        return None
    return {(out, k): True, (k, out): False}.get((first, second))


def rewrite(equation: str, x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight if stored_out_in(equation) else weight.t())


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b k", "weight": "n k"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        "the right factor must be a weight: this is a product of two activations": {"weight": "n k"},
        "the equation must contract the last index of x with one index of the weight": {"equation": "bk,nk->nb"},
        "x and the weight must have the same size: einsum would repeat a size of 1": {"x": "b one"},
    },
    samples=Samples({"equation": "bk,nk->bn"}),
    frozen=("weight",),
)
