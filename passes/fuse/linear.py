"""linear(fake_quant(x), fake_quant(W), b)  →  fxquant::linear_dynamic(x, packed(W), b)

The specification's fake-quant nodes and the float product become one integer kernel: the operator of the scheme's packed
format (fxquant/linear_formats.py), with static activations fxquant::linear_static. The packed weight is a new graph input
that comes before the user's, so nothing of the weight's value is in the graph.

A scheme without a kernel keeps its specification: aten.linear on the fake-quantized input, written out as plain operators,
and the rounded weight. A linear that stays float in our own kernel has no fake-quant nodes::

    linear(x, W, b)  →  fxquant::linear_float(x, packed(W), b)
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops, reference
from fxquant._compat import FakeTensorMode
from fxquant.binding import Packed, Slot, add_input, own_inputs
from fxquant.capture import remove_dead_code
from fxquant.format_schemes import FormatScheme
from fxquant.linear_formats import format_of
from fxquant.passes.quantize.inline import inline

aten = torch.ops.aten
OPERATORS = ops.LIBRARY  # importing ops defines the fxquant:: operators
_FAKE_QUANTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.fxquant.fake_quant_per_token.default: reference.fake_quant_per_token,
    torch.ops.fxquant.fake_quant_static.default: reference.fake_quant_static,
}


def fuse_linears(
    gm: fx.GraphModule,
    fake_mode: FakeTensorMode,
    linears: Mapping[fx.Node, Slot],
    blobs: Mapping[str, Packed],
) -> tuple[tuple[Slot, ...], tuple[int, ...]]:
    """Fuse every linear that has a slot with its packed weight; sites on one weight share one input.

    Returns the slots in the order of the new leading inputs, and the positions of the original inputs still read.
    """
    inputs = own_inputs(gm.graph)
    made: dict[Slot, tuple[fx.Node, fx.Node | None]] = {}
    for node, slot in linears.items():
        if slot not in made:
            blob, correction = blobs[slot.site].blob, blobs[slot.site].correction
            assert blob is not None
            number = len(made)
            made[slot] = (
                add_input(gm.graph, f"packed_{number}", blob, fake_mode),
                None if correction is None else add_input(gm.graph, f"correction_{number}", correction, fake_mode),
            )
        _replace(node, *made[slot], slot, fake_mode)
    remove_dead_code(gm.graph)
    for rounded in [node for node in gm.graph.find_nodes(op="placeholder") if node.meta.get("fxquant_rounded")]:
        gm.graph.erase_node(rounded)  # the packed weight holds it
    kept = []
    for position, placeholder in enumerate(inputs):
        is_source = any(position in slot.weight.sources for slot in made)
        if is_source and not placeholder.users:
            gm.graph.erase_node(placeholder)
        else:
            kept.append(position)
    gm.recompile()
    return tuple(made), tuple(kept)


def _replace(node: fx.Node, packed: fx.Node, correction: fx.Node | None, slot: Slot, fake_mode: FakeTensorMode) -> None:
    x, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if correction is not None:
        node.meta["fxquant_correction"].replace_all_uses_with(correction)
        bias = node.args[2]
    out_features = int(weight.meta["val"].shape[0])
    graph, form = node.graph, None if slot.scheme is None else format_of(slot.scheme)
    with graph.inserting_before(node), fake_mode:
        if slot.scheme is None:
            fused = graph.call_function(torch.ops.fxquant.linear_float.default, (x, packed, bias, out_features))
        elif isinstance(slot.scheme, FormatScheme) and slot.scheme.table_group is not None:
            bits = (4, 16, slot.scheme.table_group)
            fused = graph.call_function(torch.ops.fxquant.linear_stream.default, (x, packed, bias, out_features, *bits))
        elif form is None or isinstance(slot.scheme, FormatScheme):
            fused = graph.call_function(aten.linear.default, (_expanded(x, fake_mode), packed, bias))
        else:
            source = x if slot.scheme.is_weight_only else x.args[0]  # what the fake-quant node reads
            static = x.args[1:3] if slot.scheme.static else ()  # the steps and the zero point of the fake-quant node
            args = (source, packed, bias, *static, out_features, *form.extra(slot.scheme))
            fused = graph.call_function(form.overload, args)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)


def _expanded(x: fx.Node, fake_mode: FakeTensorMode) -> fx.Node:
    """The fake-quant node of an input as plain operators, which Inductor compiles; any other node as it is."""
    meaning = _FAKE_QUANTS.get(x.target)
    if meaning is None:
        return x
    nodes = [arg for arg in x.args if isinstance(arg, fx.Node)]
    numbers = x.args[len(nodes) :]
    return inline(lambda *values: meaning(*values, *numbers), nodes, x, fake_mode)
