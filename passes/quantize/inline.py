"""Puts the plain float operators of a function in a graph, so that the specification is a graph that anyone can run."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import FakeTensorMode, make_fx

_PREFIX = "_fxquant_constant_"


def inline(fn: Callable[..., Any], args: Sequence[fx.Node], before: fx.Node, fake_mode: FakeTensorMode) -> fx.Node:
    """The node of ``fn(*args)``, whose operators stand before a node of the graph.

    Constant tensors of the function become attributes of the graph's module.
    """
    values = [arg.meta["val"] for arg in args]
    with fake_mode, torch.no_grad(), torch.autocast("cpu", enabled=False):
        traced = make_fx(lambda *given: fn(*given), pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), args, strict=True))
    (output,) = traced.graph.find_nodes(op="output")
    (result,) = output.all_input_nodes
    frozen = all(arg.meta.get("fxquant_frozen", False) for arg in args)
    with before.graph.inserting_before(before):
        for old in traced.graph.nodes:
            if old.op not in ("placeholder", "output"):
                copies[old] = before.graph.node_copy(old, lambda n: copies[n])
                if old.op == "get_attr":
                    copies[old].target = _adopt(before.graph.owning_module, getattr(traced, str(old.target)))
                copies[old].meta = {**before.meta, "val": old.meta.get("val"), "fxquant_frozen": frozen}
    return copies[result]


def _adopt(root: torch.nn.Module | None, constant: Tensor) -> str:
    """The name under which a module holds a constant; equal constants share one.

    A plain attribute, as tracing makes them: AOTAutograd asks the user's source of every registered buffer.
    """
    assert root is not None
    held = {name: value for name, value in vars(root).items() if name.startswith(_PREFIX)}
    for name, other in held.items():
        if other.dtype == constant.dtype and torch.equal(other, constant):
            return name
    setattr(root, f"{_PREFIX}{len(held)}", constant.detach())
    return f"{_PREFIX}{len(held)}"
