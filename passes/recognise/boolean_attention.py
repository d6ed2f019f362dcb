"""softmax(where(mask, fill, scores)) v is left as it is

A row whose keys are all hidden gives NaN (fill = -inf) or the mean of v (a finite fill), where the fused operator gives 0.
"""

from collections.abc import Iterator
from typing import Any

import torch

from fxquant.passes.match import Match
from fxquant.passes.rule import REAL, Rule, Samples, lemma

_SENTENCE = "attention under a boolean mask stays as written: a fully masked row would change from NaN or the mean of v to 0"


def pattern(scores: Any, v: Any, hidden: Any, fill: Any, wide: Any) -> Any:
    return torch.matmul(torch.softmax(scores.masked_fill(hidden, fill), -1, wide), v)


def kept(scores: Any, v: Any, hidden: Any, fill: Any, wide: Any) -> Any:
    return torch.matmul(torch.softmax(torch.where(hidden, scores, fill), -1, wide), v)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield _SENTENCE, False


RULE = Rule(
    pattern,
    precondition,
    None,
    shapes={"scores": "b n m", "v": "b m e", "hidden": "n m"},
    error_class=REAL,
    proof=lemma("nothing is rewritten"),
    near_misses={_SENTENCE: {}},
    spellings=(kept,),
    samples=Samples({"hidden": "boolean", "fill": -1e4, "wide": torch.float32}),
)
