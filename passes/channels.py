"""Operators that carry the last dimension on value by value: views, and selections along other dimensions."""

from typing import Any

import torch
from torch import Tensor, fx

_RESHAPES = ("reshape", "view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "contiguous", "clone", "alias", "detach")


def operator_name(node: fx.Node) -> str:
    """The bare name of an operator, or the kind of node."""
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else node.op


def carried(node: fx.Node) -> fx.Node | None:
    """The value whose channels a view, a selection or a dropout that does nothing carries on, or None."""
    name, source = operator_name(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not have_one_width(source, node):
        return None
    if name in _RESHAPES or (name == "dropout" and (node.args[1] == 0 or node.args[2] is False)):
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
