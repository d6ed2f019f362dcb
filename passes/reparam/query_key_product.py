"""heads(linear(x, W, b)) heads(linear(x, U, c))ᵀ  →  x G xᵀ + x (W_h c_h) + (x (U_h b_h))ᵀ + b_h c_h  with G_h = W_hᵀ U_h

QKR (OFQ) codes the product of both weights instead of each, head by head. The reference drops the biases; here their terms
stay: that of the queries is different for every key and does not cancel in the softmax. G has more values than W and U and
costs more to apply: it is for training and runs only if asked for.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.passes.match import Match
from fxquant.passes.reparam.heads import heads
from fxquant.passes.reparam.legality import FROZEN, FULL, UNTIED, are_frozen, are_full, are_untied
from fxquant.passes.rule import ALGEBRA, REAL, Rule, Samples, Sizes

_WEIGHTS = ("weight", "bias", "key_weight", "key_bias")
_HEADS = "queries and keys must have the same heads, of a known size"
_BIASES = "both linears must have a bias, or neither"


def pattern(x: Any, weight: Any, bias: Any, split: Any, key_weight: Any, key_bias: Any, key_split: Any) -> Any:
    k = heads(x, key_weight, key_bias, key_split)
    return torch.matmul(heads(x, weight, bias, split), torch.transpose(k, -2, -1))


def precondition(m: Match) -> Iterator[tuple[str, bool]]:
    sizes = [m.split[-1], m.key_split[-1]]
    yield _HEADS, all(isinstance(s, int) and s > 0 for s in sizes) and sizes[0] == sizes[1] and _agree(m)
    yield FROZEN, are_frozen(m, *_WEIGHTS)
    yield FULL, are_full(m, "x", *_WEIGHTS)
    yield UNTIED, are_untied(m, *_WEIGHTS)
    yield _BIASES, (m.bias is None) == (m.key_bias is None)


def _agree(m: Match) -> bool:
    return bool(m.weight.shape == m.key_weight.shape)


def rewrite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    split: list[int],
    key_weight: Tensor,
    key_bias: Tensor | None,
    **unused: Any,
) -> Tensor:
    d, features = split[-1], weight.shape[1]
    q_rows, k_rows = (torch.reshape(w, [-1, d, features]) for w in (weight, key_weight))  # [heads, d, features]
    product = torch.matmul(torch.transpose(q_rows, 1, 2), k_rows)  # [heads, features, features]
    rows = torch.unsqueeze(x, 1)
    scores = torch.matmul(torch.matmul(rows, product), torch.transpose(rows, -2, -1))
    if bias is None or key_bias is None:
        return scores
    q_bias, k_bias = (torch.reshape(b, [-1, d, 1]) for b in (bias, key_bias))
    by_query = torch.matmul(rows, torch.matmul(torch.transpose(q_rows, 1, 2), k_bias))
    by_key = torch.matmul(rows, torch.matmul(torch.transpose(k_rows, 1, 2), q_bias))
    constant = torch.matmul(torch.transpose(q_bias, 1, 2), k_bias)
    return scores + by_query + torch.transpose(by_key, -2, -1) + constant


RULE = Rule(
    pattern,
    precondition,
    rewrite,
    shapes={"x": "b n k", "weight": "h*d k", "bias": "h*d", "key_weight": "h*d k", "key_bias": "h*d"},
    error_class=REAL,
    proof=ALGEBRA,
    near_misses={
        _HEADS: {"key_weight": "frozen d k", "key_bias": "frozen d", "key_split": [3, 5, 1, 4]},
        FROZEN: {"weight": "h*d k"},
        FULL: dict.fromkeys(("x", *_WEIGHTS), torch.bfloat16),
        UNTIED: {"weight": "tied"},
        _BIASES: {"bias": None},
    },
    samples=Samples({"split": Sizes("b n h d"), "key_split": Sizes("b n h d")}, scale=(0.1, 1.0)),
    frozen=_WEIGHTS,
)
