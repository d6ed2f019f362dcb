"""Proves that a mask is finite: interval arithmetic over the operators that masks are made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

Interval = tuple[float, float]
_LIMIT = torch.finfo(torch.float32).max
_VIEWS = (
    "expand",
    "view",
    "reshape",
    "unsqueeze",
    "slice",
    "select",
    "permute",
    "transpose",
    "contiguous",
    "clone",
)


def is_finite(node: fx.Node) -> bool:
    """Whether every element is finite in the node's dtype, whatever the graph's inputs are."""
    if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in node.graph.nodes):
        return False  # something may write to the mask, or to a view of it
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point and interval(node) is not None


def interval(value: Any) -> Interval | None:
    """Bounds of a number or of every element of a node's value, or None where it is not known to be finite in float32."""
    span = _bounds(value)
    # Every step is looked at: what overflowed on the way does not come back.
    return span if span is not None and span[0] >= -_LIMIT and span[1] <= _LIMIT else None


def _bounds(value: Any) -> Interval | None:
    if isinstance(value, (bool, int, float)):
        return (float(value), float(value))
    if not isinstance(value, fx.Node):
        return None
    meta = value.meta.get("val")
    if isinstance(meta, Tensor) and meta.dtype == torch.bool:
        return (0.0, 1.0)
    if value.op != "call_function" or not isinstance(value.target, torch._ops.OpOverload):
        return None
    if not isinstance(meta, Tensor) or meta.dtype != torch.float32 or "alpha" in value.kwargs:
        return None  # half precision may have overflowed; a factor alpha is not followed
    name = value.target._schema.name.partition("::")[2]
    if name in _VIEWS or (name in ("to", "_to_copy") and isinstance(meta, Tensor) and meta.dtype == torch.float32):
        return interval(value.args[0])
    handler = _HANDLERS.get(name)
    return handler(*value.args) if handler else None


def _union(*values: Any) -> Interval | None:
    spans = [interval(value) for value in values]
    known = [span for span in spans if span is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if len(known) == len(spans) else None


def _add(a: Any, b: Any) -> Interval | None:
    x, y = interval(a), interval(b)
    return (x[0] + y[0], x[1] + y[1]) if x and y else None


def _sub(a: Any, b: Any) -> Interval | None:
    x, y = interval(a), interval(b)
    return (x[0] - y[1], x[1] - y[0]) if x and y else None


def _mul(a: Any, b: Any) -> Interval | None:
    x, y = interval(a), interval(b)
    corners = [i * j for i in x for j in y] if x and y else []
    return (min(corners), max(corners)) if corners else None


_HANDLERS: dict[str, Callable[..., Interval | None]] = {
    "add": _add,
    "sub": _sub,
    "rsub": lambda a, b, alpha=1: _sub(b, a) if alpha == 1 else None,
    "mul": _mul,
    "where": lambda condition, a, b: _union(a, b),
    "masked_fill": lambda a, mask, fill: _union(a, fill),
    "full": lambda size, fill, *_: interval(fill),
    "full_like": lambda a, fill, *_: interval(fill),
    "scalar_tensor": lambda fill, *_: interval(fill),
    "zeros": lambda *_: (0.0, 0.0),
    "zeros_like": lambda *_: (0.0, 0.0),
    "ones": lambda *_: (1.0, 1.0),
    "tril": lambda a, *_: _union(a, 0.0),
    "triu": lambda a, *_: _union(a, 0.0),
}
