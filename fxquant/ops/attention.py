"""The operators of fused attention.

``attention_int`` codes q and k (and with ``pv_bits`` 8 also the weights and v) as ``reference.attention`` has it.
``attention_int_trace`` is the same call and returns beside the result what the kernel computed on its way, for tests: codes
of q and k, their scales, the sums of products and the weights (0 where a causal
row does not see the key).
"""

import torch
from torch import Tensor

from fxquant.ops.library import define


def attention_result(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """[B, H, N, e] with the heads side by side in memory, or [B, N, e]."""
    if q.dim() == 3:
        return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)


def _attention_int(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, qk_bits: int, pv_bits: int
) -> Tensor:
    return attention_result(q, k, v, mask, is_causal, scale)


def _trace(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, qk_bits: int, pv_bits: int
) -> tuple[Tensor, ...]:
    return (
        attention_result(q, k, v, mask, is_causal, scale),
        q.new_empty(q.shape, dtype=torch.int8),
        k.new_empty(k.shape, dtype=torch.int8),
        q.new_empty(q.shape[:-1]),
        k.new_empty(k.shape[:-1]),
        q.new_empty((*q.shape[:-1], k.shape[-2]), dtype=torch.int32),
        q.new_empty((*q.shape[:-1], k.shape[-2]), dtype=torch.uint8),
    )


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale"
define(f"attention({_ARGUMENTS}) -> Tensor", attention_result)
define(f"attention_int({_ARGUMENTS}, int qk_bits, int pv_bits) -> Tensor", _attention_int)
define(
    f"attention_int_trace({_ARGUMENTS}, int qk_bits, int pv_bits) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _trace,
)
