"""Puts the plain float operators of a function in a graph, so that the specification is a graph that anyone can run."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxquant._compat import FakeTensorMode, make_fx
from fxquant.errors import CaptureError


def inline(fn: Callable[..., Any], args: Sequence[fx.Node], before: fx.Node, fake_mode: FakeTensorMode) -> fx.Node:
    """The node of ``fn(*args)``, whose operators stand before a node of the graph.

    Raises:
        CaptureError: the function holds a constant tensor; it must make one by operators.
    """
    values = [arg.meta["val"] for arg in args]
    with fake_mode, torch.no_grad(), torch.autocast("cpu", enabled=False):
        traced = make_fx(fn, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    if traced.graph.find_nodes(op="get_attr"):
        raise CaptureError(f"{getattr(fn, '__qualname__', fn)} makes a constant tensor; it must make one by operators")
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), args, strict=True))
    (output,) = traced.graph.find_nodes(op="output")
    (result,) = output.all_input_nodes
    frozen = all(arg.meta.get("fxquant_frozen", False) for arg in args)
    with before.graph.inserting_before(before):
        for old in traced.graph.nodes:
            if old.op not in ("placeholder", "output"):
                copies[old] = before.graph.node_copy(old, lambda n: copies[n])
                copies[old].meta = {**before.meta, "val": old.meta["val"], "fxquant_frozen": frozen}
    return copies[result]
