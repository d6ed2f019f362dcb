"""s · layer_norm(x, γ, β)  →  layer_norm(x, s·γ, s·β)

LayerNorm scaling (LNS) multiplies the norms of layer l by 1/√l: a constant that γ and β take up, whoever reads the norm.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from fxquant.passes.match import Match
from fxquant.passes.reparam.legality import FROZEN, FULL, UNTIED, are_frozen, are_full, are_untied
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples, Sizes

_NUMBER = "s must be a number"
_GAIN = "the norm must have γ"


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield _NUMBER, isinstance(m.s, (int, float)) and not isinstance(m.s, bool)
    yield _GAIN, isinstance(m.gamma, Tensor)
    yield FROZEN, are_frozen(m, *_weights(m))
    yield FULL, are_full(m, "x", *_weights(m))
    yield UNTIED, are_untied(m, *_weights(m))


def _weights(m: Match) -> list[str]:
    return [name for name in ("gamma", "beta") if name in m.operands]


def _rule(place: Callable[[Any, Any], Any], is_layer: bool) -> Rule:
    def layer(x: Any, size: Any, gamma: Any, beta: Any, eps: Any, s: Any) -> Any:
        return place(layer_norm(x, size, gamma, beta, eps), s)

    def root_mean_square(x: Any, size: Any, gamma: Any, eps: Any, s: Any) -> Any:
        return place(rms_norm(x, size, gamma, eps), s)

    def scaled_layer(x: Tensor, size: list[int], gamma: Tensor, beta: Tensor | None, eps: float, s: float) -> Tensor:
        return layer_norm(x, size, place(gamma, s), None if beta is None else place(beta, s), eps)

    def scaled_root_mean_square(x: Tensor, size: list[int], gamma: Tensor, eps: float | None, s: float) -> Tensor:
        return rms_norm(x, size, place(gamma, s), eps)

    return Rule(
        layer if is_layer else root_mean_square,
        precondition,
        scaled_layer if is_layer else scaled_root_mean_square,
        shapes={"x": "b n", "gamma": "n"} | ({"beta": "n"} if is_layer else {}),
        error_class=REAL,
        proof=ALGEBRA,
        near_misses={
            _NUMBER: {"s": "n"},
            _GAIN: {"gamma": None},
            FROZEN: {"gamma": "n"},
            FULL: {"x": torch.bfloat16, "gamma": torch.bfloat16},
            UNTIED: {"gamma": "tied"},
        },
        samples=Samples({"size": Sizes("n"), "eps": 1e-5, "s": 0.5}),
        frozen=("gamma", "beta"),
    )


def _times(x: Any, s: Any) -> Any:
    return x * s


def _over(x: Any, s: Any) -> Any:
    return x / s


RULES = tuple(_rule(place, is_layer) for place in (_times, _over) for is_layer in (True, False))
