"""w · x · rsqrt(mean(x²) + ε)  →  rms_norm(x, w, ε)

Llama, T5 and their descendants write RMSNorm out; as one operator it is one site.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from fxquant.passes.match import Match
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples


def _square(x: Any) -> Any:
    return torch.pow(x, 2)


def _product(x: Any) -> Any:
    return x * x


def _by_rsqrt(x: Any, eps: Any, square: Callable[[Any], Any]) -> Any:
    return x * torch.rsqrt(torch.mean(square(x), -1, True) + eps)


def _by_quotient(x: Any, eps: Any, square: Callable[[Any], Any]) -> Any:
    return x / torch.sqrt(torch.mean(square(x), -1, True) + eps)


def pattern(x: Any, weight: Any, eps: Any) -> Any:
    return weight * _by_rsqrt(x, eps, _square)


def product(x: Any, weight: Any, eps: Any) -> Any:
    return weight * _by_rsqrt(x, eps, _product)


def quotient(x: Any, weight: Any, eps: Any) -> Any:
    return weight * _by_quotient(x, eps, _square)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "x must be float32: in half precision the written casts decide the rounding", m.x.dtype == torch.float32
    yield "the weight must be a float32 tensor", isinstance(m.weight, Tensor) and m.weight.dtype == torch.float32
    yield "the weight must be one vector as long as a row of x", _is_row(m)
    yield "ε must be a positive number", isinstance(m.eps, float) and m.eps > 0


def _is_row(m: Match) -> bool:
    size = m.x.shape[-1] if m.x.dim() else None
    return m.weight.dim() == 1 and isinstance(size, int) and isinstance(m.weight.shape[0], int) and m.weight.shape[0] == size


def rewrite(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, [x.shape[-1]], weight, eps)


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b n", "weight": "n"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        "x must be float32: in half precision the written casts decide the rounding": {"x": torch.bfloat16},
        "the weight must be a float32 tensor": {"weight": 2.0},
        "the weight must be one vector as long as a row of x": {"weight": "b n"},
        "ε must be a positive number": {"eps": -1e-6},
    },
    spellings=(product, quotient),
    samples=Samples({"eps": 1e-6}, scale=(0.1, 10.0)),
)
