"""softmax((q kᵀ) · τ + mask) v  →  scaled_dot_product_attention(q · τ, k, v, mask, scale=1) with a factor τ of each row

Selective self-attention (SSA) gives every query a temperature of its own. A factor of a whole row of scores is a factor of
its query, whatever the row; behind that any attention kernel works. A temperature that differs between keys is left.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fxquant.passes.match import Match
from fxquant.passes.recognise.attention import is_hidden_safe, lead
from fxquant.passes.rule import REAL, Rule, Samples, lemma

# The scores with a number s in one of its usual places.
SCORES: dict[str, Callable[..., Any]] = {
    "plain": lambda q, kt, s: torch.matmul(q, kt),
    "mul": lambda q, kt, s: torch.matmul(q, kt) * s,
    "div": lambda q, kt, s: torch.matmul(q, kt) / s,
}
FACTOR: dict[str, Callable[[float], float]] = {"plain": lambda s: 1.0, "mul": lambda s: s, "div": lambda s: 1.0 / s}
_SHAPE = "q, k and v must be tensors of 3 or 4 dimensions with the same batch and head sizes"
_FLOAT = "q, k, v and τ must be float32: in half precision the written casts decide the rounding"
_ROWS = "τ must be a number or have one value a row of scores: a last size of 1, and no more dimensions than q"
_NUMBER = "the scale must be a number"
_MASK = "the mask must be float32, have 2 dimensions up to those of q, and be proved finite"


def _rule(place: str, divided: bool) -> Rule:
    scores, factor = SCORES[place], FACTOR[place]

    def warm(q: Any, kt: Any, s: Any, tau: Any) -> Any:
        return scores(q, kt, s) / tau if divided else scores(q, kt, s) * tau

    def pattern(q: Any, kt: Any, v: Any, s: Any, tau: Any) -> Any:
        return torch.matmul(torch.softmax(warm(q, kt, s, tau), -1), v)

    def masked(q: Any, kt: Any, v: Any, s: Any, tau: Any, mask: Any) -> Any:
        return torch.matmul(torch.softmax(warm(q, kt, s, tau) + mask, -1), v)

    def rewrite(
        q: Tensor, kt: Tensor, v: Tensor, s: float | None, tau: Tensor | float, mask: Tensor | None, **unused: Any
    ) -> Tensor:
        scale = factor(1.0 if s is None else s)
        rows = q
        if isinstance(tau, Tensor):
            rows = q / tau if divided else q * tau
        else:
            scale = scale / tau if divided else scale * tau
        made: Tensor = scaled_dot_product_attention(rows, kt.transpose(-2, -1), v, attn_mask=mask, scale=scale)
        return made.contiguous()  # a matmul's result is, and a later view relies on it

    return Rule(
        pattern,
        precondition,
        rewrite,
        shapes={"q": "b h n d", "kt": "b h d m", "v": "b h m e", "tau": "b h n one", "mask": "n m"},
        error_class=REAL,
        proof=lemma("row i of the scores is q_i kᵀ; τ_i (q_i kᵀ) = (τ_i q_i) kᵀ, and the softmax sees the same scores"),
        near_misses=NEAR_MISSES if place == "mul" and not divided else {},
        spellings=(masked,),
        samples=Samples({"s": 0.35, "tau": "positive", "mask": "finite"}, scale=(0.1, 1.0)),
    )


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    tensors = (m.q, m.kt, m.v)
    yield _SHAPE, all(value.dim() in (3, 4) for value in tensors) and len({lead(value) for value in tensors}) == 1
    floats = (*tensors, m.tau) if isinstance(m.tau, Tensor) else tensors
    yield _FLOAT, all(value.dtype == torch.float32 for value in floats) and m.is_computed_in(torch.float32)
    yield _NUMBER, m.s is None or isinstance(m.s, (int, float))
    yield _ROWS, _is_row_factor(m.tau, m.q)
    yield _MASK, is_hidden_safe(m)


def _is_row_factor(tau: Any, q: Tensor) -> bool:
    if not isinstance(tau, Tensor):
        return isinstance(tau, (int, float))
    if tau.dim() > q.dim() or (tau.dim() and str(tau.shape[-1]) != "1"):
        return False
    pairs = zip(reversed(tau.shape), reversed(q.shape), strict=False)
    return all(str(size) in ("1", str(of)) for size, of in pairs)


NEAR_MISSES: dict[str, dict[str, Any]] = {
    _SHAPE: {"v": "one h m e"},
    _FLOAT: {"q": torch.bfloat16, "kt": torch.bfloat16, "v": torch.bfloat16, "tau": torch.bfloat16},
    _NUMBER: {"s": "b h n m"},
    _ROWS: {"tau": "b h n m"},
    _MASK: {"mask": "n m"},
}
RULES = tuple(_rule(place, divided) for place in SCORES for divided in (False, True))
