"""linear(x, (γ/σ(W))·W, b) is left as it is

sigmaReparam: σ(W) comes from W and a buffer by a power step, so the whole weight is a constant of the graph. It is computed
once, when the weight is packed, and not again before it changes.
"""

from collections.abc import Iterator
from typing import Any

from torch.nn.functional import linear

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import FROZEN, are_frozen
from fxquant.passes.rule import BITWISE, Rule, lemma

CONSTANT = "γ/σ(W)·W is made of weights alone: it is computed when the weight is packed, and stays as it is written"


def pattern(x: Any, weight: Any, gamma: Any, sigma: Any, bias: Any) -> Any:
    return linear(x, gamma / sigma * weight, bias)


def divided(x: Any, weight: Any, gamma: Any, sigma: Any, bias: Any) -> Any:
    return linear(x, gamma * weight / sigma, bias)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield FROZEN, are_frozen(m, "weight", "gamma", "sigma")
    yield CONSTANT, False


RULE = Rule(
    pattern,
    precondition,
    None,
    shapes={"x": "b n", "weight": "k n", "gamma": "one", "sigma": "one", "bias": "k"},
    error_class=BITWISE,
    proof=lemma("nothing is rewritten"),
    near_misses={FROZEN: {"sigma": "one"}, CONSTANT: {}},
    spellings=(divided,),
    frozen=("weight", "gamma", "sigma", "bias"),
)
