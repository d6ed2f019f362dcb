"""linear(fake_quant(x), fake_quant(W), b)  →  fxquant::linear_dynamic(x, packed(W), b)

The specification's fake-quant nodes and the float product become one integer kernel: the operator of the scheme's packed
format (fxquant/linear_formats.py). The packed weight is a new graph input that comes before all others, so nothing of the
weight's value is in the graph.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxquant._compat import FakeTensorMode
from fxquant.binding import Slot
from fxquant.capture import remove_dead_code
from fxquant.linear_formats import format_of

aten = torch.ops.aten


def fuse_linears(
    gm: fx.GraphModule,
    fake_mode: FakeTensorMode,
    linears: Mapping[fx.Node, Slot],
    blobs: Mapping[str, Tensor],
) -> tuple[tuple[Slot, ...], tuple[int, ...]]:
    """Fuse every quantized linear with its packed weight; sites on one weight share one input.

    Returns the slots in the order of the new leading inputs, and the positions of the original inputs still read.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    made: dict[Slot, fx.Node] = {}
    for node, slot in linears.items():
        if slot not in made:
            made[slot] = _add_input(gm.graph, inputs[0], f"packed_{len(made)}", blobs[slot.site], fake_mode)
        _replace(node, made[slot], slot, fake_mode)
    remove_dead_code(gm.graph)
    kept = []
    for position, placeholder in enumerate(inputs):
        is_source = any(position in slot.weight.sources for slot in made)
        if is_source and not placeholder.users:
            gm.graph.erase_node(placeholder)
        else:
            kept.append(position)
    gm.recompile()
    return tuple(made), tuple(kept)


def _add_input(graph: fx.Graph, before: fx.Node, name: str, blob: Tensor, fake_mode: FakeTensorMode) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.placeholder(name)
    node.meta["val"] = fake_mode.from_tensor(blob, static_shapes=True)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node.meta["fxquant_name"] = name
    node._dynamo_source = None
    return node


def _replace(node: fx.Node, packed: fx.Node, slot: Slot, fake_mode: FakeTensorMode) -> None:
    quantized, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    assert isinstance(quantized, fx.Node)
    assert isinstance(weight, fx.Node)
    out_features = int(weight.meta["val"].shape[0])
    graph = node.graph
    with graph.inserting_before(node), fake_mode:
        form = format_of(slot.scheme)
        args = (quantized.args[0], packed, bias, out_features, *form.extra(slot.scheme))
        fused = graph.call_function(form.overload, args)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)
