"""Which nodes are row-wise work that fxquant::rows knows: float32 on the CPU, of a fixed width, on rows of one count."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# Views and copies that hand the same rows on; dropout only where it is off.
ALIASES = (
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze,
    aten.contiguous, aten.clone, aten.detach, aten.dropout,
)  # fmt: skip


def rows_of(node: fx.Node) -> str | None:
    """The number of rows of a float32 value as text (symbolic sizes by name), or None where it has no rows for us."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() < 1 or value.device.type != "cpu":
        return None
    if not isinstance(value.shape[-1], int) or value.shape[-1] < 1:
        return None
    return str(math.prod(value.shape[:-1]))


def width_of(node: fx.Node) -> int:
    """The last size of a value."""
    return int(node.meta["val"].shape[-1])


def is_alias(node: fx.Node) -> bool:
    """Whether a node only hands rows on."""
    return _packet(node) in ALIASES


def is_linear(node: fx.Node) -> bool:
    """Whether a node is a quantized linear."""
    return _packet(node) in (torch.ops.fxquant.linear_dynamic, torch.ops.fxquant.linear_static)


def is_row_wise(node: fx.Node) -> bool:
    """Whether fxquant::rows can compute a node (or, for a view, hand it on)."""
    packet = _packet(node)
    if packet is None or rows_of(node) is None or node.target._schema.is_mutable:  # type: ignore[union-attr]
        return False
    if is_alias(node):
        source = node.args[0]
        is_on = packet == aten.dropout and node.args[2] is not False
        return isinstance(source, fx.Node) and not is_on and _same_rows(source, node)
    check = _CHECKS.get(packet)
    return check is not None and check(node) and all(_matches(operand, node) for operand in row_operands(node))


def row_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that are rows; vectors, weights and numbers are not."""
    if _packet(node) not in (aten.add, aten.mul):
        first = node.args[0]
        return [first] if isinstance(first, fx.Node) else []
    nodes = [arg for arg in node.args[:2] if isinstance(arg, fx.Node)]
    rows = [arg for arg in nodes if _same_rows(arg, node)]
    return rows if rows else nodes


def is_vector_for(vector: fx.Node, node: fx.Node) -> bool:
    """Whether a value holds one float32 number a column of ``node``, the same for all rows."""
    value = vector.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.device.type != "cpu" or value.dim() < 1:
        return False
    return all(isinstance(size, int) for size in value.shape) and value.numel() == value.shape[-1] == width_of(node)


def _packet(node: fx.Node) -> object:
    is_operator = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return node.target.overloadpacket if is_operator else None  # type: ignore[union-attr]


def _same_rows(a: fx.Node, b: fx.Node) -> bool:
    return rows_of(a) is not None and rows_of(a) == rows_of(b) and width_of(a) == width_of(b)


def _matches(operand: fx.Node, node: fx.Node) -> bool:
    return rows_of(operand) == rows_of(node) if is_linear(node) else _same_rows(operand, node)


def _norm(node: fx.Node) -> bool:
    vectors = [arg for arg in node.args[2:4] if isinstance(arg, fx.Node)]
    is_last = list(node.args[1]) == [width_of(node)]  # type: ignore[arg-type]
    return is_last and all(is_vector_for(vector, node) for vector in vectors)


def _sum_or_product(node: fx.Node) -> bool:
    if node.kwargs.get("alpha", 1) != 1 or not all(isinstance(arg, fx.Node) for arg in node.args[:2]):
        return False
    operands = row_operands(node)
    others = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and arg not in operands]
    return len(operands) + len(others) == len(set(node.args[:2])) and all(is_vector_for(arg, node) for arg in others)


def _linear(node: fx.Node) -> bool:
    return node.args[2] is None or (isinstance(node.args[2], fx.Node) and is_vector_for(node.args[2], node))


def _linear_static(node: fx.Node) -> bool:
    x, steps = node.args[0], node.args[3]
    return _linear(node) and isinstance(x, fx.Node) and isinstance(steps, fx.Node) and is_vector_for(steps, x)


def _always(node: fx.Node) -> bool:
    return True


_CHECKS: dict[object, Callable[[fx.Node], bool]] = {
    torch.ops.fxquant.linear_dynamic: _linear,
    torch.ops.fxquant.linear_static: _linear_static,
    aten.layer_norm: _norm,
    aten.rms_norm: _norm,
    aten.gelu: _always,
    torch.ops.fxquant.gelu: _always,
    aten.silu: _always,
    aten.relu: _always,
    aten.add: _sum_or_product,
    aten.mul: _sum_or_product,
}
