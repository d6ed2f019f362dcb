"""einsum(softmax(s · einsum(q, k)), v)  →  scaled_dot_product_attention(q, k, v, scale=s)

The einsum spelling of attention, with keys on either side of the contraction's result.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fxquant.passes.match import Match
from fxquant.passes.rule import REAL, Rule, Samples, lemma

_LAYOUT = "both equations must be plain attention over the same leading indices: bhid,bhjd->bhij and bhij,bhjd->bhid"


def pattern(first: Any, second: Any, q: Any, k: Any, v: Any, s: Any) -> Any:
    return torch.einsum(second, [torch.softmax(torch.einsum(first, [q, k]) * s, -1), v])


def divided(first: Any, second: Any, q: Any, k: Any, v: Any, divisor: Any) -> Any:
    return torch.einsum(second, [torch.softmax(torch.einsum(first, [q, k]) / divisor, -1), v])


def unscaled(first: Any, second: Any, q: Any, k: Any, v: Any) -> Any:
    return torch.einsum(second, [torch.softmax(torch.einsum(first, [q, k]), -1), v])


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield (
        "q, k and v must be float32",
        all(value.dtype == torch.float32 for value in (m.q, m.k, m.v)) and m.is_computed_in(torch.float32),
    )
    yield "the scale must be a number", all(s is None or isinstance(s, (int, float)) for s in (m.s, m.divisor))
    yield _LAYOUT, is_attention(m.first, m.second)
    yield "q, k and v must have the same sizes: einsum would repeat a size of 1", _agree(m.q, m.k, m.v)


def _agree(q: Tensor, k: Tensor, v: Tensor) -> bool:
    # Compared as text: a comparison of symbolic sizes would add a guard.
    (*q_lead, _, q_size), (*k_lead, keys, k_size), (*v_lead, values, _) = (list(map(str, x.shape)) for x in (q, k, v))
    return q_lead == k_lead == v_lead and q_size == k_size and keys == values


def is_attention(first: str, second: str) -> bool:
    """Whether two equations compute q kᵀ and p v over [batch..., token, feature] operands."""
    try:
        (q, k), scores = _split(first)
        (p, v), out = _split(second)
    except ValueError:
        return False
    *lead, i, d = list(q)
    if len(lead) not in (1, 2) or len({*lead, i, d}) != len(q) or len(k) != len(q) or k[-1] != d or list(k[:-2]) != lead:
        return False
    j = k[-2]
    if j in {*lead, i, d} or list(scores) != [*lead, i, j] or len(p) != len(q) or len(v) != len(q):
        return False
    rename = dict(zip(scores, p, strict=True))
    fresh = v[-1] not in p
    return fresh and list(v[:-1]) == [*(rename[x] for x in lead), rename[j]] and list(out) == [*p[:-1], v[-1]]


def _split(equation: str) -> tuple[tuple[str, str], str]:
    left, out = equation.replace(" ", "").split("->")
    a, b = left.split(",")
    return (a, b), out


def rewrite(q: Tensor, k: Tensor, v: Tensor, s: float | None, divisor: float | None, **equations: Any) -> Tensor:
    scale = 1.0 if s is None and divisor is None else s if divisor is None else 1.0 / divisor
    return scaled_dot_product_attention(
        q, k, v, scale=scale
    ).contiguous()  # a matmul's result is, and a later view relies on it


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"q": "b h n d", "k": "b h m d", "v": "b h m e"},
    error_class=REAL,
    proof=lemma("the two contractions are q kᵀ and p v by their equations; without a mask the operator is defined that way"),
    near_misses={
        "q, k and v must be float32": {"q": torch.bfloat16, "k": torch.bfloat16, "v": torch.bfloat16},
        "the scale must be a number": {"s": "b h n m"},
        _LAYOUT: {"second": "bhij,bhjd->bidh"},
        "q, k and v must have the same sizes: einsum would repeat a size of 1": {"k": "b h one d"},
    },
    spellings=(divided, unscaled),
    samples=Samples({"first": "bhid,bhjd->bhij", "second": "bhij,bhjd->bhid", "s": 0.5, "divisor": 2.0}, scale=(0.1, 1.0)),
)
