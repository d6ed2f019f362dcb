"""linear(batch_norm(xᵀ)ᵀ + η·x, W, b)  →  linear(x, W·a, b + W c)  with a = g/√(var + ε) + η, c = β - g·μ/√(var + ε)

SLAB trains a LayerNorm into RepBN(x) = batch_norm(x) + η·x. In evaluation both are affine in every channel, and the linears
behind take them up: no norm is left to compute. All linears that read it do, or none does.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import FROZEN, FULL, UNTIED, are_frozen, are_full, are_untied, has_size
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples

_WEIGHTS = ("g", "beta", "mean", "var", "weight", "bias")
_STATISTICS = "g, β, μ and var must have one value a feature that the linear reads"
_ETA = "η must be a number or one weight"


def pattern(
    x: Any,
    g: Any,
    beta: Any,
    mean: Any,
    var: Any,
    momentum: Any,
    eps: Any,
    fast: Any,
    eta: Any,
    weight: Any,
    bias: Any,
) -> Any:
    channels = torch.transpose(x, 1, 2)
    normal = torch.batch_norm(channels, g, beta, mean, var, False, momentum, eps, fast)
    return linear(torch.transpose(normal + eta * channels, 1, 2), weight, bias)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield _STATISTICS, all(has_size(v, m.weight.shape[1]) for v in (m.g, m.beta, m.mean, m.var))
    yield _ETA, isinstance(m.eta, (int, float)) or (has_size(m.eta, 1) and m.is_frozen("eta"))
    yield FROZEN, are_frozen(m, *_WEIGHTS)
    yield FULL, are_full(m, "x", "eta", *_WEIGHTS)
    yield UNTIED, are_untied(m, *_WEIGHTS)


def rewrite(
    x: Tensor,
    g: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    eta: Tensor | float,
    weight: Tensor,
    bias: Tensor | None,
    **unused: Any,
) -> Tensor:
    gain = g / torch.sqrt(var + eps)
    shift = torch.matmul(weight, beta - gain * mean)
    return linear(x, weight * (gain + eta), shift if bias is None else shift + bias)


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={
        "x": "b m n",
        "g": "n",
        "beta": "n",
        "mean": "n",
        "var": "n",
        "eta": "one",
        "weight": "k n",
        "bias": "k",
    },
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        _STATISTICS: {"g": None},
        _ETA: {"eta": "one"},
        FROZEN: {"weight": "k n"},
        FULL: {"eta": torch.float64},
        UNTIED: {"weight": "tied"},
    },
    samples=Samples({"var": "positive", "momentum": 0.1, "eps": 1e-5, "fast": True}),
    frozen=(*_WEIGHTS, "eta"),
    joint=True,
)
