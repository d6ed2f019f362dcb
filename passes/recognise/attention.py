"""softmax(s · q kᵀ + mask) v  →  scaled_dot_product_attention(q, k, v, mask, scale=s)

Attention written out with matmuls becomes one operator: one pair of sites, and a kernel that needs no N x M buffer. The
operator gives 0 for a row whose keys are all masked with -inf, the spelling gives NaN; so a mask must be proved finite.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fxquant.passes.match import Match
from fxquant.passes.recognise.finite import is_finite
from fxquant.passes.rule import REAL, Rule, Samples, lemma

# Scores of q and kᵀ (bound as it stands, whatever view made it), with the scale in any of its places.
SCORES: dict[str, Callable[..., Any]] = {
    "plain": lambda q, kt, s: torch.matmul(q, kt),
    "mul": lambda q, kt, s: torch.matmul(q, kt) * s,
    "mul q": lambda q, kt, s: torch.matmul(q * s, kt),
    "mul k": lambda q, kt, s: torch.matmul(q, kt * s),
    "mul both": lambda q, kt, s: torch.matmul(q * s, kt * s),
    "div": lambda q, kt, s: torch.matmul(q, kt) / s,
    "div q": lambda q, kt, s: torch.matmul(q / s, kt),
}
SCALE: dict[str, Callable[[float], float]] = {
    "plain": lambda s: 1.0,
    "mul": lambda s: s,
    "mul q": lambda s: s,
    "mul k": lambda s: s,
    "mul both": lambda s: s * s,
    "div": lambda s: 1.0 / s,
    "div q": lambda s: 1.0 / s,
}


def _rule(place: str) -> Rule:
    scores, factor = SCORES[place], SCALE[place]

    def pattern(q: Any, kt: Any, v: Any, s: Any, wide: Any) -> Any:
        return torch.matmul(torch.softmax(scores(q, kt, s), -1, wide), v)

    def masked(q: Any, kt: Any, v: Any, s: Any, wide: Any, mask: Any) -> Any:
        return torch.matmul(torch.softmax(scores(q, kt, s) + mask, -1, wide), v)

    def rewrite(q: Tensor, kt: Tensor, v: Tensor, s: float | None, mask: Tensor | None, **unused: Any) -> Tensor:
        scale = factor(1.0 if s is None else s)
        return scaled_dot_product_attention(
            q, kt.transpose(-2, -1), v, attn_mask=mask, scale=scale
        ).contiguous()  # a matmul's result is, and a later view relies on it

    return Rule(
        pattern,
        precondition,
        rewrite,
        shapes={"q": "b h n d", "kt": "b h d m", "v": "b h m e", "mask": "n m"},
        error_class=REAL,
        proof=lemma(
            "the operator is defined as softmax(scale q kᵀ + mask) v; with finite masks no row is fully masked, the only "
            "case in which the two differ"
        ),
        near_misses=NEAR_MISSES if place == "mul" else {},
        spellings=(masked,),
        samples=Samples({"s": 0.35, "wide": torch.float32, "mask": "finite"}, scale=(0.1, 1.0)),
    )


_HIDDEN = "the mask may hold -inf: a fully masked row would change from NaN to 0"


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield "q, k and v must be tensors of 3 or 4 dimensions", all(v.dim() in (3, 4) for v in (m.q, m.kt, m.v))
    yield "q, k and v must share their batch and head sizes", len({lead(v) for v in (m.q, m.kt, m.v)}) == 1
    yield "k and v must not be weights", not (m.is_frozen("kt") or m.is_frozen("v"))
    yield (
        "q, k and v must be float32: in half precision the written casts decide the rounding",
        all(v.dtype == torch.float32 for v in (m.q, m.kt, m.v)) and m.is_computed_in(torch.float32),
    )
    yield "the scale must be a number", m.s is None or isinstance(m.s, (int, float))
    mask = m.node("mask")
    yield (
        "the mask must be a float32 tensor with 2 dimensions up to those of q",
        m.mask is None or _is_float_mask(m.mask, m.q),
    )
    yield "the mask must not widen the scores", m.mask is None or _fits(m.mask, [*m.q.shape[:-1], m.kt.shape[-1]])
    yield _HIDDEN, m.mask is None or (mask is not None and is_finite(mask))


def is_hidden_safe(m: Match) -> bool:
    """Whether there is no mask, or one that fits the scores and is proved finite."""
    mask = m.node("mask")
    if m.mask is None:
        return True
    fits = _is_float_mask(m.mask, m.q) and _fits(m.mask, [*m.q.shape[:-1], m.kt.shape[-1]])
    return fits and mask is not None and is_finite(mask)


def lead(x: Tensor) -> tuple[str, ...]:
    """Batch and head sizes as text."""
    return tuple(map(str, x.shape[:-2]))  # compared as text: a comparison of symbolic sizes would add a guard


def _is_float_mask(mask: Any, q: Tensor) -> bool:
    return isinstance(mask, Tensor) and 2 <= mask.dim() <= q.dim() and mask.dtype == torch.float32


def _fits(mask: Tensor, scores: list[Any]) -> bool:
    return all(str(size) in ("1", str(of)) for size, of in zip(reversed(mask.shape), reversed(scores), strict=False))


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "q, k and v must be tensors of 3 or 4 dimensions": {"q": "n d", "kt": "d m", "v": "m e"},
    "q, k and v must share their batch and head sizes": {"v": "one h m e"},
    "k and v must not be weights": {"v": "frozen b h m e"},
    "q, k and v must be float32: in half precision the written casts decide the rounding": {
        "q": torch.bfloat16,
        "kt": torch.bfloat16,
        "v": torch.bfloat16,
        "wide": None,
    },
    "the scale must be a number": {"s": "b h n m"},
    "the mask must be a float32 tensor with 2 dimensions up to those of q": {"mask": "m"},
    "the mask must not widen the scores": {"q": "b h one d", "mask": "n m"},
    _HIDDEN: {"mask": "n m"},
}
RULES = tuple(_rule(place) for place in SCORES)
