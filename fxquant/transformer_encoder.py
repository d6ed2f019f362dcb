"""``nn.TransformerEncoderLayer`` in eval mode is one opaque ATen operator; this spells it out for the rules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu, scaled_dot_product_attention

aten = torch.ops.aten


def encoder_layer_decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator → its spelling, for make_fx."""
    return {aten._transformer_encoder_layer_fwd.default: encoder_layer}


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """The layer's output, [batch, length, embed_dim] as ``src``. ``mask`` is True (non-zero) where a key is ignored.

    ``mask_type`` 0: [length, length]; 1: [batch, length]; 2: [batch, heads, length, length]. A row whose keys are all
    ignored gives NaN, as the operator does.
    """

    def norm_1(x: Tensor) -> Tensor:
        return layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        heads = _split_heads(linear(x, qkv_weight, qkv_bias), num_heads)
        return linear(_join_heads(_attention(*heads, mask, mask_type)), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = linear(x, ffn_weight_1, ffn_bias_1)
        return linear(gelu(hidden) if use_gelu else relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed_forward(x))


def _split_heads(packed: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = packed.shape
    q, k, v = packed.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _join_heads(x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * size)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mask_type: int | None) -> Tensor:
    if mask is None:
        return scaled_dot_product_attention(q, k, v)
    ignored = mask.to(torch.bool)
    if mask_type == 1:
        ignored = ignored[:, None, None, :]
    out = scaled_dot_product_attention(q, k, v, attn_mask=ignored.logical_not())
    return out.masked_fill(ignored.all(-1, keepdim=True), math.nan)
