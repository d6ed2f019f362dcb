"""attention(q, k, v) · sigmoid(g) is left as it is

Gated attention (Quantizable Transformers, gated attention for LLMs) opens or closes each head. The attention inside has its
kernel; the gate stays a product behind it, and the codes of what reads it must be made from the gated values.
"""

from collections.abc import Iterator
from typing import Any

import torch

from fxquant.passes.match import Match
from fxquant.passes.rule import REAL, Rule, Samples, Sizes, lemma

GATE = "the gate of attention stays a product after it: the attention kernel does not take it in"


def _attend(q: Any, k: Any, v: Any, mask: Any, dropout: Any, causal: Any, scale: Any, grouped: Any) -> Any:
    function = torch.nn.functional.scaled_dot_product_attention
    return function(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)


def pattern(q: Any, k: Any, v: Any, mask: Any, dropout: Any, causal: Any, scale: Any, grouped: Any, gate: Any) -> Any:
    return _attend(q, k, v, mask, dropout, causal, scale, grouped) * torch.sigmoid(gate)


def by_token(q: Any, k: Any, v: Any, mask: Any, dropout: Any, causal: Any, scale: Any, grouped: Any, gate: Any) -> Any:
    heads = _attend(q, k, v, mask, dropout, causal, scale, grouped)
    return torch.transpose(heads, 1, 2) * torch.sigmoid(gate)


def merged(q: Any, k: Any, v: Any, mask: Any, dropout: Any, causal: Any, scale: Any, grouped: Any, size: Any, wide: Any) -> Any:
    heads = _attend(q, k, v, mask, dropout, causal, scale, grouped)
    return torch.reshape(torch.transpose(heads, 1, 2), size) * torch.sigmoid(wide)


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    yield GATE, False


RULE = Rule(
    pattern,
    precondition,
    None,
    shapes={"q": "b h n d", "k": "b h m d", "v": "b h m d", "gate": "one", "wide": "one"},
    error_class=REAL,
    proof=lemma("nothing is rewritten"),
    near_misses={GATE: {}},
    spellings=(by_token, merged),
    samples=Samples({"mask": None, "dropout": 0.0, "causal": False, "scale": 0.35, "grouped": False, "size": Sizes("b n h*d")}),
)
