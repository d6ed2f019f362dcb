"""Operators that carry values on as they are, or at least the last dimension of them: views, selections, idle casts."""

from typing import Any

import torch
from torch import Tensor, fx

_RESHAPES = ("reshape", "view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "clone")


def operator_name(node: fx.Node) -> str:
    """The bare name of an operator, or the kind of node."""
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else node.op


def carried(node: fx.Node) -> fx.Node | None:
    """The value whose channels a view, a selection or an operator that changes nothing carries on, or None."""
    if (same := _unchanged(node)) is not None:
        return same
    name, source = operator_name(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not have_one_width(source, node):
        return None
    if name in _RESHAPES:
        return source
    if name in ("select", "slice", "index_select"):
        return source if is_not_last(source, node.args[1] if len(node.args) > 1 else 0) else None
    if name == "transpose":
        return source if all(is_not_last(source, dim) for dim in node.args[1:3]) else None
    if name == "permute" and isinstance(node.args[1], (list, tuple)):
        return source if node.args[1] and not is_not_last(source, node.args[1][-1]) else None
    return None


def is_not_last(node: fx.Node, dim: Any) -> bool:
    """Whether a dimension is known and is not the last one of a node's value."""
    return isinstance(dim, int) and dim % node.meta["val"].dim() != node.meta["val"].dim() - 1


def have_one_width(*nodes: Any) -> bool:
    """Whether values are tensors with one last size, compared as text."""
    values = [node.meta.get("val") for node in nodes]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    return len(shapes) == len(nodes) and all(shapes) and len({str(shape[-1]) for shape in shapes}) == 1


def look_through(node: fx.Node, views: bool = False) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The value behind operators that change nothing, and those operators; ``views`` only keep the channels last."""
    passed: tuple[fx.Node, ...] = ()
    while (source := (carried(node) if views else _unchanged(node))) is not None:
        passed += (node,)
        node = source
    return node, passed


def _unchanged(node: fx.Node) -> fx.Node | None:
    name = operator_name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if name == "dropout" and len(node.args) == 3 and (node.args[1] == 0 or node.args[2] is False):
        return source
    if name in ("alias", "detach", "contiguous", "lift_fresh_copy"):
        return source
    if name in ("slice", "reshape", "view") and all("val" in n.meta for n in (source, node)):
        whole = [tuple(map(str, n.meta["val"].shape)) for n in (source, node)]
        return source if whole[0] == whole[1] else None  # x[:], a reshape to the same shape
    if name in ("to", "_to_copy", "type_as"):
        before, after = source.meta.get("val"), node.meta.get("val")
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            return source if (before.dtype, before.device) == (after.dtype, after.device) else None
    return None
