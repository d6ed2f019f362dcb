"""scaled_dot_product_attention(q, k, v, mask)  →  fq(softmax(fq(q) fq(k)ᵀ · scale + mask)) fq(v),  fq = fake_quant

The specification of an attention whose operands a calibration coded, in plain operators. Qparams are graph inputs: layers that
share a graph may differ in them.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import FakeTensorMode
from fxquant.binding import add_input
from fxquant.calibration.attention import AttentionCalibration
from fxquant.granularity import Granularity, PerChannel, PerTensor
from fxquant.passes.quantize.inline import inline


def conditions(args: Mapping[str, Any], known: AttentionCalibration) -> Iterator[tuple[str, bool]]:
    """(sentence, whether it holds) for the operands of an attention node by name: whether the qparams fit them."""
    q, k, v = (args[name].meta["val"] for name in "qkv")
    yield "without a scale, the head size must be known", args["scale"] is not None or isinstance(q.shape[-1], int)
    shapes = {"q": q.shape, "k": k.shape, "p": (*q.shape[:-1], k.shape[-2]), "v": v.shape}
    for name, static in known.codings.items():
        granularity = static.coding.granularity
        blocks = _block_count(granularity, shapes[name])
        yield f"static qparams of {name} must be per tensor or per channel, not {granularity}", blocks is not None
        counts = {len(value) for value in static.qparams.values()}
        found = " or ".join(map(str, sorted(counts)))
        yield (
            f"the calibration has {found} blocks of {name}, {granularity}; this attention has {blocks}",
            all(str(count) == str(blocks) for count in counts),
        )


def _block_count(granularity: Granularity, shape: tuple[Any, ...]) -> Any:
    """How many blocks a shape has; None where that does not depend on the site alone."""
    if isinstance(granularity, PerTensor):
        return 1
    if isinstance(granularity, PerChannel) and -len(shape) <= granularity.axis < len(shape):
        return shape[granularity.axis]
    return None


def quantize_attention(
    node: fx.Node, args: Mapping[str, Any], known: AttentionCalibration, fake_mode: FakeTensorMode
) -> fx.Node:
    """Replace an attention node with operands ``args`` by its specification; returns the node of the result.

    The qparams become inputs of the graph, in the order of ``known.tensors()``.
    """
    graph, old = node.graph, node.meta["val"]
    tensors = {name: add_input(graph, f"{node.name}_{name}", value, fake_mode) for name, value in known.tensors().items()}
    operands = {name: args[name] for name in ("q", "k", "v", "mask") if args[name] is not None}
    names = [*operands, *tensors]

    def specification(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return attention(given, known, is_causal=bool(args["is_causal"]), scale=args["scale"])

    try:
        made = inline(specification, [*operands.values(), *tensors.values()], node, fake_mode)
    except Exception:
        for added in tensors.values():  # nothing reads them, and nobody would feed them
            graph.erase_node(added)
        raise
    if _layout(made.meta["val"]) != _layout(old) and old.dim() == 4:
        made = inline(_heads_last, [made], node, fake_mode)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def attention(
    given: Mapping[str, Tensor], known: AttentionCalibration, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """The specification for q [..., T, d], k [..., M, d], v [..., M, dv], perhaps a mask, and the qparams, all by name."""
    q, k, v = (known.fake_quant(name, given[name], given) for name in "qkv")
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    p = probabilities(q, k, mask=given.get("mask"), is_causal=is_causal, scale=scale)
    return known.fake_quant("p", p, given) @ v


def probabilities(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """``softmax(q kᵀ · scale + mask)`` [..., T, M]; a row that a mask hides altogether is zero.

    ``mask`` is bool (True takes part) or float32; ``is_causal`` counts from the first row and the first key.
    """
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is None:
        return torch.softmax(scores, -1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    hidden = scores.amax(-1, keepdim=True) == -math.inf
    return torch.softmax(scores, -1).masked_fill(hidden, 0.0)


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, Hk, M, d] as often as q [B, H, T, d] has heads for each; of three axes as they are."""
    if x.dim() == 3 or x.shape[1] == q.shape[1]:
        return x
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _heads_last(x: Tensor) -> Tensor:
    """The same values, with the heads of a row side by side in memory, as PyTorch's operator leaves them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _layout(x: Tensor) -> tuple[str, ...]:
    return tuple(map(str, x.stride()))  # as text: comparing symbolic strides would add guards
