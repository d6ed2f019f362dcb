"""clip(stretch · softmax(s · q kᵀ) + shift, low, high) v is left as it is

Clipped softmax lets a head attend to nothing. There is no kernel for it yet: the report names it, the graph keeps it.
"""

from collections.abc import Iterator
from typing import Any

import torch

from fxquant.passes.match import Match
from fxquant.passes.rule import REAL, Rule, Samples, lemma

_SENTENCE = "clipped softmax attention keeps its own spelling: there is no kernel for it yet"


def pattern(scores: Any, v: Any, stretch: Any, shift: Any, low: Any, high: Any) -> Any:
    return torch.matmul(torch.clamp(torch.softmax(scores, -1) * stretch + shift, low, high), v)


def subtracted(scores: Any, v: Any, stretch: Any, shift: Any, low: Any, high: Any) -> Any:
    return torch.matmul(torch.clip(torch.softmax(scores, -1) * stretch - shift, low, high), v)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield _SENTENCE, False


RULE = Rule(
    pattern,
    precondition,
    None,
    shapes={"scores": "b n m", "v": "b m e"},
    error_class=REAL,
    proof=lemma("nothing is rewritten"),
    near_misses={_SENTENCE: {}},
    samples=Samples({"stretch": 1.06, "shift": 0.03, "low": 0.0, "high": 1.0}),
    spellings=(subtracted,),
)
