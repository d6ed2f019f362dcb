"""x W + b  →  linear(x, Wᵀ, b) for a weight W [in, out]

addmm, matmul and mm spellings of a linear layer (Conv1D of GPT-2, plain functions) become the one operator that the
quantizer reads. Only weights are rewritten: a product of two activations stays a matmul.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxquant.passes.match import Match
from fxquant.passes.rule import ALGEBRA, REAL, Rule


def pattern(x: Any, weight: Any, bias: Any) -> Any:
    return torch.addmm(bias, x, weight)


def matmul_add(x: Any, weight: Any, bias: Any) -> Any:
    return torch.matmul(x, weight) + bias


def matmul(x: Any, weight: Any) -> Any:
    return torch.matmul(x, weight)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "the right factor must be a weight: this is a product of two activations", m.is_frozen("weight")
    yield "the weight must be a matrix", m.weight.dim() == 2
    yield "x must be a matrix or a batch of rows", m.x.dim() >= 2
    yield "the bias must be one vector, one value an output", m.bias is None or _is_bias(m)


def _is_bias(m: Match) -> bool:
    if not isinstance(m.bias, Tensor) or m.bias.dim() != 1 or m.bias.dtype != m.x.dtype:
        return False
    sizes = (m.bias.shape[0], m.weight.shape[1])
    return all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1]


def rewrite(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight.t(), bias)


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b k", "weight": "k n", "bias": "n"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        "the right factor must be a weight: this is a product of two activations": {"weight": "k n"},
        "the weight must be a matrix": {"weight": "frozen k"},
        "x must be a matrix or a batch of rows": {"x": "k"},
        "the bias must be one vector, one value an output": {"bias": "b n"},
    },
    spellings=(matmul_add, matmul),
    frozen=("weight",),
)
