"""x · sigmoid(1.702 x) is left as it is

It is an approximation of GELU that differs by up to 0.02: another function, so it is named and never replaced.
"""

from collections.abc import Iterator
from typing import Any

import torch

from fxquant.passes.match import Match
from fxquant.passes.rule import REAL, Rule, lemma


def pattern(x: Any) -> Any:
    return x * torch.sigmoid(1.702 * x)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "quick GELU x·sigmoid(1.702x) is another function than GELU; it stays as written", False


RULE = Rule(
    pattern,
    precondition,
    None,
    shapes={"x": "b n"},
    error_class=REAL,
    proof=lemma("nothing is rewritten"),
    near_misses={"quick GELU x·sigmoid(1.702x) is another function than GELU; it stays as written": {}},
)
