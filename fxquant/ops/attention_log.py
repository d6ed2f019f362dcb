"""The operators of attention with logarithmic codes of its weights (``reference.log_attention``).

Qparams are float32 of one block or one a head; those of v are one a channel with ``v_per_channel``. ``*_top`` are the greatest
codes; an operand without zero point is symmetric, q and k without scale stay float. ``codes`` counts those other than zero.
``attention_log_trace`` returns beside the result scores, lse, codes and the sums of every plane, for tests (0 where a causal
row does not see the key).
"""

import torch
from torch import Tensor

from fxquant.ops.attention import attention_result
from fxquant.ops.library import define


def _attention_log(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, *rest: object
) -> Tensor:
    return attention_result(q, k, v, mask, is_causal, scale)


def _trace(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, *rest: object
) -> tuple[Tensor, ...]:
    pairs, planes = (*q.shape[:-1], k.shape[-2]), torch.library.get_ctx().new_dynamic_size()
    return (
        attention_result(q, k, v, mask, is_causal, scale),
        q.new_empty(pairs),
        q.new_empty(q.shape[:-1]),
        q.new_empty(pairs, dtype=torch.int16),
        q.new_empty((planes, *q.shape[:-1], v.shape[-1])),
    )


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, Tensor? q_scale, Tensor? q_zero_point,"
    " Tensor? k_scale, Tensor? k_zero_point, Tensor v_scale, Tensor? v_zero_point, Tensor p_scale, Tensor? p_base,"
    " int q_top, int k_top, int v_top, bool v_per_channel, int family, int width, int codes"
)
define(f"attention_log({_ARGUMENTS}) -> Tensor", _attention_log)
define(f"attention_log_trace({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _trace)
