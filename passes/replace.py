"""Puts a rule's rewrite in the place of what it matched: all of it, or nothing.

The rewrite is traced first, and what it would leave behind is compared with what stands there: a rewrite that changes
shape, dtype or memory layout would break a later view, or a cast that was decided on the old value.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxquant._compat import ENTER_AUTOCAST, EXIT_AUTOCAST, make_fx, maybe_fake_mode
from fxquant.errors import RuleError

if TYPE_CHECKING:
    from fxquant.passes.match import Match


def trace_rewrite(match: "Match") -> fx.GraphModule:
    """The rewrite as a graph over the tensor operands; traced with their fake values, where the root stands."""
    tensors = _tensors(match)
    fixed = {name: value for name, value in match.operands.items() if name not in tensors}
    rewrite = match.rule.rewrite
    assert rewrite is not None

    def call(*values: Tensor) -> Any:
        return rewrite(**fixed, **dict(zip(tensors, values, strict=True)))

    values = [node.meta["val"] for node in tensors.values()]
    with maybe_fake_mode(values), _autocast_at(match.root):
        traced: fx.GraphModule = make_fx(call, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    if traced.graph.find_nodes(op="get_attr"):
        raise RuleError(f"rule {match.rule.name}: the rewrite makes a constant tensor; use a number instead")
    return traced


def misfit(root: fx.Node, body: fx.GraphModule) -> str | None:
    """Why the result of a traced rewrite cannot stand where ``root`` stands, or None."""
    old, new = root.meta["val"], _result(body).meta["val"]
    # Compared as text: a comparison of symbolic sizes would add a guard.
    for what, of in (("dtype", _dtype), ("device", _device), ("shape", _shape), ("memory layout", _layout)):
        if of(old) != of(new):
            return f"the rewrite would change the {what} of the result from {of(old)} to {of(new)}"
    return None


def insert(match: "Match", body: fx.GraphModule) -> list[fx.Node]:
    """Replace the match by its traced rewrite; returns the nodes that are gone. A failure leaves the graph as it was."""
    result = _copy_before(match, body)
    match.root.replace_all_uses_with(result)
    erased = []
    for node in sorted({*match.nodes, *match.aliases}, reverse=True):  # from the root backwards
        if not node.users:
            node.graph.erase_node(node)
            erased.append(node)
    return erased


def _copy_before(match: "Match", body: fx.GraphModule) -> fx.Node:
    root = match.root
    made: list[fx.Node] = []
    copies: dict[fx.Node, fx.Node] = dict(zip(body.graph.find_nodes(op="placeholder"), _tensors(match).values(), strict=True))
    try:
        with root.graph.inserting_before(root):
            for old in body.graph.nodes:
                if old.op in ("placeholder", "output"):
                    continue
                new = root.graph.node_copy(old, lambda n: copies[n])
                made.append(new)
                new.meta = {**_like(match, old).meta, "val": old.meta["val"]}
                new.meta["fxquant_frozen"] = all(n.meta.get("fxquant_frozen", False) for n in new.all_input_nodes)
                new.meta["fxquant"] = {"rule": match.rule.name, "replaced": [n.name for n in match.nodes]}
                copies[old] = new
        return copies[_result(body)]
    except Exception:
        for node in reversed(made):
            root.graph.erase_node(node)
        raise


def _like(match: "Match", made: fx.Node) -> fx.Node:
    """The node whose module a new node belongs to: that of the same operator, else the root."""
    return next((node for node in match.nodes if node.target is made.target), match.root)


def _tensors(match: "Match") -> dict[str, fx.Node]:
    return {name: value for name, value in match.operands.items() if isinstance(value, fx.Node)}


def _result(body: fx.GraphModule) -> fx.Node:
    output: fx.Node = body.graph.find_nodes(op="output")[0]
    (result,) = output.all_input_nodes
    return result


def _autocast_at(node: fx.Node) -> AbstractContextManager[Any]:
    """The innermost autocast region that a node stands in: operators put there get their dtypes from it."""
    entered: list[fx.Node] = []
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is ENTER_AUTOCAST:
            entered.append(other)
        elif other.target is EXIT_AUTOCAST:
            entered.pop()
    if not entered:
        return contextlib.nullcontext()
    device, dtype, enabled, _ = entered[-1].args
    return torch.autocast(device, dtype, enabled, cache_enabled=False)  # type: ignore[arg-type]


def _dtype(value: Tensor) -> str:
    return str(value.dtype)


def _device(value: Tensor) -> str:
    return str(value.device)


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape))


def _layout(value: Tensor) -> str:
    """Strides; that of a dimension of size 1 means nothing."""
    strides = ("1" if str(size) == "1" else str(stride) for size, stride in zip(value.shape, value.stride(), strict=True))
    return "strides " + ", ".join(strides)
