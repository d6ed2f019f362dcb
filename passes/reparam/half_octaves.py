"""(δ·2^(-q/2)) v  →  δ·(2^-⌈q/2⌉ [q even]) v + √2·δ·(2^-⌈q/2⌉ [q odd]) v

RepQ-ViT codes attention weights in powers of √2. The factor √2 of odd codes is one of each element and does not leave the
sum; two sums, one for even and one for odd codes, are made of shifts alone. For shift kernels: it runs only if asked for.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.rule import REAL, Rule, Samples, lemma

_LIMITS = "the codes' limits must be whole numbers"
_SCALE = "δ must be a number"
_ROOT = math.sqrt(2.0)


def _codes(y: Any, low: Any, high: Any) -> Any:
    return torch.clamp(torch.round(y), low, high)


def pattern(y: Any, low: Any, high: Any, v: Any, delta: Any) -> Any:
    return torch.matmul(torch.exp2(_codes(y, low, high) * -0.5) * delta, v)


def unscaled(y: Any, low: Any, high: Any, v: Any) -> Any:
    return torch.matmul(torch.exp2(_codes(y, low, high) * -0.5), v)


def written(y: Any, low: Any, high: Any, v: Any, delta: Any) -> Any:
    q = _codes(y, low, high)
    power = torch.exp2(torch.neg(torch.ceil(q / 2.0)))
    return torch.matmul(power * (torch.remainder(q, 2.0) * (_ROOT - 1.0) + 1.0) * delta, v)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield _LIMITS, all(isinstance(limit, (int, float)) and limit == math.floor(limit) for limit in (m.low, m.high))
    yield _SCALE, m.delta is None or (isinstance(m.delta, (int, float)) and not isinstance(m.delta, bool))


def rewrite(y: Tensor, low: float, high: float, v: Tensor, delta: float | None) -> Tensor:
    q = _codes(y, low, high)
    is_odd = torch.remainder(q, 2.0) == 1.0
    power = torch.exp2(torch.neg(torch.ceil(q / 2.0)))
    scale = 1.0 if delta is None else delta
    even, odd = power.masked_fill(is_odd, 0.0), power.masked_fill(~is_odd, 0.0)
    return torch.matmul(even, v) * scale + torch.matmul(odd, v) * (scale * _ROOT)


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"y": "b n m", "v": "b m e"},
    error_class=REAL,
    proof=lemma("for a whole q, 2^(-q/2) = 2^-⌈q/2⌉ √2^(q mod 2); the sum is split by the parity of q"),
    near_misses={_LIMITS: {"high": 14.5}, _SCALE: {"delta": "b n m"}},
    spellings=(unscaled, written),
    samples=Samples({"low": 0.0, "high": 15.0, "delta": 0.9}),
)
