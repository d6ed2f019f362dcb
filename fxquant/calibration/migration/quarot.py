"""QuaRot's and SpinQuant's rotations of a Llama-like decoder: new weights, the same function.

An RMSNorm without γ commutes with an orthogonal R: rms(x R) = rms(x) R. So, with torch's layout [out, in]:

1. ``fold_norms``: γ goes into the readers, W ← W diag(γ).
2. ``rotate_stream`` (R1): embedding E ← E R, readers and head W ← W R, writers W ← Rᵀ W, b ← Rᵀ b.
3. ``rotate_heads`` (R2): the rows of v's heads ← Rᵀ, the columns of o's heads ← R. SpinQuant's form: no work at run time.
   QuaRot has a rotation across heads besides, which would have to be done at run time.
4. ``rotate_down`` (R4): W_down ← W_down H / √n, and the caller puts ``hadamard.transform`` before that linear.

arXiv 2404.00456, 2405.16406. A model with LayerNorms is first centred (``center_writer``): M = I - 11ᵀ / d into every writer,
after which a LayerNorm is an RMSNorm. Norms must come before their linears: where the norm's output is the residual stream
itself (post-norm) no rotation exists. A tied head must be untied, q and k with norms of their own keep R2 off them. Do this in
float64 and cast once.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.calibration.migration.hadamard import transform
from fxquant.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder layer, weights [out, in]. Biases of q, k, gate and up are left as they are by every rotation."""

    attention_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Decoder:
    """Embedding and head [vocabulary, d], blocks, the final norm [d]."""

    embedding: Tensor
    blocks: tuple[Block, ...]
    norm: Tensor
    head: Tensor


def fold_norms(decoder: Decoder) -> Decoder:
    """Every γ in the readers of its norm, and 1 in its place."""
    one = torch.ones_like(decoder.norm)
    blocks = tuple(
        replace(
            block,
            attention_norm=one,
            mlp_norm=one,
            **{name: getattr(block, name) * block.attention_norm for name in ("q", "k", "v")},
            **{name: getattr(block, name) * block.mlp_norm for name in ("gate", "up")},
        )
        for block in decoder.blocks
    )
    return replace(decoder, blocks=blocks, norm=one, head=decoder.head * decoder.norm)


def rotate_stream(decoder: Decoder, rotation: Tensor) -> Decoder:
    """R1 [d, d] for the residual stream.

    Raises:
        CalibrationError: a norm still has γ, or the rotation is not orthogonal or does not fit.
    """
    check_rotation(rotation, decoder.norm.numel())
    norms = [decoder.norm, *(norm for block in decoder.blocks for norm in (block.attention_norm, block.mlp_norm))]
    if any(bool((norm != 1).any()) for norm in norms):
        raise CalibrationError("a norm's γ does not commute with a rotation; call fold_norms first")
    return replace(
        decoder,
        embedding=decoder.embedding @ rotation,
        head=decoder.head @ rotation,
        blocks=tuple(_rotate_block(block, rotation) for block in decoder.blocks),
    )


def _rotate_block(block: Block, rotation: Tensor) -> Block:
    return replace(
        block,
        **{name: getattr(block, name) @ rotation for name in ("q", "k", "v", "gate", "up")},
        o=rotation.T @ block.o,
        down=rotation.T @ block.down,
        o_bias=None if block.o_bias is None else rotation.T @ block.o_bias,
        down_bias=None if block.down_bias is None else rotation.T @ block.down_bias,
    )


def rotate_heads(block: Block, rotation: Tensor, heads: int, kv_heads: int) -> Block:
    """R2 [d_head, d_head] for the values, the same for all heads of a block (query heads may share value heads).

    Raises:
        CalibrationError: the rotation is not orthogonal, or the heads do not fit.
    """
    size = len(rotation)
    check_rotation(rotation, size)
    if (block.v.shape[0], block.o.shape[1]) != (kv_heads * size, heads * size) or heads % kv_heads:
        raise CalibrationError(
            f"v {tuple(block.v.shape)} and o {tuple(block.o.shape)} are not of {kv_heads} and {heads} heads of {size}"
        )
    columns = block.o.unflatten(1, (heads, size)) @ rotation
    values = rotation.T @ block.v.unflatten(0, (kv_heads, size))
    bias = None if block.v_bias is None else (block.v_bias.view(kv_heads, size) @ rotation).reshape(-1)
    return replace(block, v=values.flatten(0, 1), o=columns.flatten(1), v_bias=bias)


def rotate_down(block: Block) -> Block:
    """R4: a block whose down linear expects ``hadamard.transform`` of its input."""
    return replace(block, down=transform(block.down))


def center_writer(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """M W and M b: what is written to the stream has mean 0. An embedding is centred as the transpose."""
    return weight - weight.mean(0), None if bias is None else bias - bias.mean()


def check_rotation(rotation: Tensor, size: int) -> None:
    """Raises:
    CalibrationError: it is not [size, size] or not orthogonal.
    """
    if rotation.shape != (size, size):
        raise CalibrationError(f"a rotation of {size} channels is [{size}, {size}], not {tuple(rotation.shape)}")
    off = float((rotation @ rotation.T - torch.eye(size, dtype=rotation.dtype)).abs().amax())
    if off > 100 * size * torch.finfo(rotation.dtype).eps:
        raise CalibrationError(f"the rotation is not orthogonal: R Rᵀ is {off:.3g} away from the identity")
