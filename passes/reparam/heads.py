"""What rules about attention share: the way from a linear to the heads that attention reads, and back."""

from typing import Any

import torch
from torch.nn.functional import linear

ROTARY = ("cos", "sin", "half", "end")


def heads(x: Any, weight: Any, bias: Any, split: Any) -> Any:
    """linear(x), its features split into heads: [batch, heads, tokens, features]."""
    return torch.transpose(torch.reshape(linear(x, weight, bias), split), 1, 2)


def attend(q: Any, k: Any, v: Any, mask: Any, dropout: Any, causal: Any, scale: Any, grouped: Any) -> Any:
    """scaled_dot_product_attention with every argument an operand."""
    function = torch.nn.functional.scaled_dot_product_attention
    return function(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)


def rotate(x: Any, cos: Any, sin: Any, half: Any, end: Any) -> Any:
    """RoPE as Llama spells it: feature i turns with feature i + half."""
    slice_ = torch.ops.aten.slice.Tensor
    turned = torch.cat([torch.neg(slice_(x, -1, half, end)), slice_(x, -1, 0, half)], -1)
    return x * cos + turned * sin


def merge(x: Any, merged: Any, weight: Any, bias: Any) -> Any:
    """linear of heads put side by side."""
    return linear(torch.reshape(torch.transpose(x, 1, 2), merged), weight, bias)


def repeat(x: Any, wide: Any, narrow: Any) -> Any:
    """Heads of keys or values, each repeated for its group of query heads, as Llama spells it."""
    return torch.reshape(torch.ops.aten.expand.default(torch.unsqueeze(x, 2), wide), narrow)


def for_groups(factor: Any, depth: int, groups: int) -> Any:
    """A factor of the features of key heads, for the query heads that read them: a head's features in one piece."""
    by_head = torch.reshape(factor, [-1, depth])
    return torch.flatten(torch.repeat_interleave(by_head, groups, 0), 0)


def group_count(many: Any, few: Any) -> int | None:
    """How many query features read one key feature, or None where it does not come out even."""
    known = isinstance(many, int) and isinstance(few, int) and few > 0
    return many // few if known and many % few == 0 else None
