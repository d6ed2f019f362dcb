"""exp(x - max x) / Σ exp(x - max x)  →  softmax(x, -1)

A hand-written softmax reads its row three times; as one operator it is one site and one kernel.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.rule import REAL, Rule, lemma


def pattern(x: Any) -> Any:
    return _quotient(torch.exp(x - torch.amax(x, -1, True)))


def shared_max(x: Any) -> Any:
    return _quotient(torch.exp(x - torch.max(x, -1, True)[0]))


def _quotient(e: Any) -> Any:
    return e / torch.sum(e, -1, True)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "x must be float32 or float64", m.x.dtype in (torch.float32, torch.float64)
    yield "x must have at least one dimension", m.x.dim() > 0


def rewrite(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b n"},
    error_class=REAL,
    proof=lemma("both sides divide exp(x - m) by its sum with the same m = max x; the operator is defined that way"),
    near_misses={
        "x must be float32 or float64": {"x": torch.bfloat16},
        "x must have at least one dimension": {"x": ""},
    },
    spellings=(shared_max,),
)
