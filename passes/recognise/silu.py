"""x · sigmoid(x)  →  silu(x)

The gate of SwiGLU feed-forward blocks; as one operator it fuses into the epilogue of the linear before it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from fxquant.passes.match import Match
from fxquant.passes.rule import ALGEBRA, REAL, Rule


def pattern(x: Any) -> Any:
    return x * torch.sigmoid(x)


def method(x: Any) -> Any:
    return x * x.sigmoid()


def quotient(x: Any) -> Any:
    return x / (1.0 + torch.exp(-x))


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "x must be a floating-point tensor", isinstance(m.x, Tensor) and m.x.dtype.is_floating_point


def rewrite(x: Tensor) -> Tensor:
    return silu(x)


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b n"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={"x must be a floating-point tensor": {"x": torch.int64}},
    spellings=(method, quotient),
)
