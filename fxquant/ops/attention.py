"""The operator of fused attention."""

from torch import Tensor

from fxquant.ops.library import define


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """[B, H, N, e] with the heads side by side in memory, or [B, N, e]."""
    if q.dim() == 3:
        return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)


define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale) -> Tensor", _attention)
