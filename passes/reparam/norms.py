"""The pattern that all migrations into a norm share: one linear that reads a norm.

A norm is LayerNorm or RMSNorm over the last dimension. A norm without γ gets one where a factor needs it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import layer_norm, linear, rms_norm

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import FROZEN, FULL, UNTIED, are_frozen, are_full, are_untied, has_size

MATRIX = "the norm must span exactly the features that the linear reads"
SHAPES = {"x": "b n", "gamma": "n", "beta": "n", "weight": "k n", "bias": "k"}
WEIGHTS = ("gamma", "beta", "weight", "bias")

NEAR_MISSES: dict[str, dict[str, Any]] = {  # of ``legal``
    FROZEN: {"weight": "k n"},
    MATRIX: {"x": "b m n", "size": [5, 5], "gamma": "frozen m n", "beta": "frozen m n"},
    FULL: {"x": torch.bfloat16, "gamma": torch.bfloat16},
    UNTIED: {"weight": "tied"},
}


def after_layer_norm(x: Any, size: Any, gamma: Any, beta: Any, eps: Any, weight: Any, bias: Any) -> Any:
    return linear(layer_norm(x, size, gamma, beta, eps), weight, bias)


def after_rms_norm(x: Any, size: Any, gamma: Any, eps: Any, weight: Any, bias: Any) -> Any:
    return linear(rms_norm(x, size, gamma, eps), weight, bias)


SPELLINGS: tuple[Callable[..., Any], ...] = (after_layer_norm, after_rms_norm)


def legal(m: Match) -> Iterator[tuple[str, bool]]:
    """The conditions of every migration between a norm and the linears that read it."""
    yield FROZEN, are_frozen(m, *WEIGHTS)
    yield MATRIX, m.weight.dim() == 2 and has_size(m.weight, m.weight.shape[0], *m.size)
    yield FULL, are_full(m, "x", *WEIGHTS)
    yield UNTIED, are_untied(m, *WEIGHTS)
