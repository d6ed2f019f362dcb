"""γ · (x - mean x) / √(var x + ε) + β  →  layer_norm(x, γ, β, ε)

Older models write LayerNorm out; as one operator it is one site, read once.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from fxquant.passes.match import Match
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples


def _centred(x: Any) -> Any:
    return x - torch.mean(x, -1, True)


_VARIANCE: tuple[Callable[[Any], Any], ...] = (
    lambda x: torch.mean(torch.pow(_centred(x), 2), -1, True),
    lambda x: torch.mean(_centred(x) * _centred(x), -1, True),
    lambda x: torch.var(x, -1, unbiased=False, keepdim=True),
    lambda x: torch.var(x, -1, correction=0, keepdim=True),
)
_SCALE: tuple[Callable[[Any, Any], Any], ...] = (
    lambda x, v: _centred(x) / torch.sqrt(v),
    lambda x, v: _centred(x) * torch.rsqrt(v),
)


def _spelled(variance: Callable[[Any], Any], scale: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def pattern(x: Any, gamma: Any, beta: Any, eps: Any) -> Any:
        return gamma * scale(x, variance(x) + eps) + beta

    return pattern


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "x must be float32: in half precision the written casts decide the rounding", m.x.dtype == torch.float32
    yield "γ and β must be vectors as long as a row of x", all(_is_row(v, m.x) for v in (m.gamma, m.beta))
    yield "γ and β must be float32", all(v.dtype == torch.float32 for v in (m.gamma, m.beta))
    yield "ε must be a positive number", isinstance(m.eps, float) and m.eps > 0


def _is_row(value: Any, x: Tensor) -> bool:
    sizes = [*value.shape, x.shape[-1]] if isinstance(value, Tensor) and value.dim() == 1 and x.dim() else []
    return len(sizes) == 2 and all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1]


def rewrite(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return layer_norm(x, [x.shape[-1]], gamma, beta, eps)


_FIRST, *_OTHERS = [_spelled(variance, scale) for variance, scale in product(_VARIANCE, _SCALE)]

RULE = Rule(
    _FIRST,
    precondition,
    rewrite,
    shapes={"x": "b n", "gamma": "n", "beta": "n"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        "x must be float32: in half precision the written casts decide the rounding": {"x": torch.bfloat16},
        "γ and β must be vectors as long as a row of x": {"gamma": "b n"},
        "γ and β must be float32": {"gamma": torch.float64},
        "ε must be a positive number": {"eps": -1e-9},
    },
    spellings=tuple(_OTHERS),
    samples=Samples({"eps": 1e-5}, scale=(0.1, 10.0)),
)
