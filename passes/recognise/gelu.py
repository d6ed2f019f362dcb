"""x · ½ · (1 + erf(x / √2))  →  gelu(x), and its tanh approximation  →  gelu(x, "tanh")

Models spell GELU out in a dozen ways; one operator gives one site, one fused epilogue and one line in the report.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from fxquant.passes.match import Match
from fxquant.passes.rule import ALGEBRA, REAL, Rule

# How the halves are put together, for a gate g of x.
_OUTER: tuple[Callable[[Any, Any], Any], ...] = (
    lambda x, g: x * 0.5 * (1.0 + g),
    lambda x, g: x * (0.5 * (1.0 + g)),
    lambda x, g: x * (1.0 + g) * 0.5,
    lambda x, g: x * ((1.0 + g) * 0.5),
)
_ERF: tuple[Callable[[Any], Any], ...] = (
    lambda x: torch.erf(x / math.sqrt(2.0)),
    lambda x: torch.erf(x * math.sqrt(0.5)),
)
_C = math.sqrt(2.0 / math.pi)
_TANH: tuple[Callable[[Any], Any], ...] = (
    lambda x: torch.tanh(_C * (x + 0.044715 * torch.pow(x, 3.0))),
    lambda x: torch.tanh(_C * (x + 0.044715 * torch.pow(x, 3))),
    lambda x: torch.tanh(_C * (x + 0.044715 * x * x * x)),
    lambda x: torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)),
    lambda x: torch.tanh(x * _C * (1.0 + 0.044715 * x * x)),
    lambda x: torch.tanh(_C * x * (1.0 + 0.044715 * torch.pow(x, 2))),
)


def _spelled(outer: Callable[[Any, Any], Any], gate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def pattern(x: Any) -> Any:
        return outer(x, gate(x))

    return pattern


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "x must be a floating-point tensor", isinstance(m.x, Tensor) and m.x.dtype.is_floating_point


def rewrite_erf(x: Tensor) -> Tensor:
    return gelu(x)


def rewrite_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _rule(gates: tuple[Callable[[Any], Any], ...], rewrite: Callable[[Tensor], Tensor]) -> Rule:
    first, *others = [_spelled(outer, gate) for gate, outer in product(gates, _OUTER)]
    return Rule(
        first,
        precondition,
        rewrite,
        shapes={"x": "b n"},
        error_class=REAL,
        proof=ALGEBRA,
        near_misses={"x must be a floating-point tensor": {"x": torch.int64}},
        spellings=tuple(others),
    )


ERF, TANH = _rule(_ERF, rewrite_erf), _rule(_TANH, rewrite_tanh)
