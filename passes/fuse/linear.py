"""linear(fake_quant(x), fake_quant(W), b)  →  fxquant::linear_dynamic(x, packed(W), b)

The specification's fake-quant nodes and the float product become one integer kernel: the operator of the scheme's packed
format (fxquant/linear_formats.py), with static activations fxquant::linear_static. The packed weight is a new graph input
that comes before the user's, so nothing of the weight's value is in the graph.

A linear that stays float in our own kernel has no fake-quant nodes::

    linear(x, W, b)  →  fxquant::linear_float(x, packed(W), b)
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxquant._compat import FakeTensorMode
from fxquant.binding import Slot, add_input, own_inputs
from fxquant.capture import remove_dead_code
from fxquant.linear_formats import format_of

aten = torch.ops.aten


def fuse_linears(
    gm: fx.GraphModule,
    fake_mode: FakeTensorMode,
    linears: Mapping[fx.Node, Slot],
    blobs: Mapping[str, Tensor],
) -> tuple[tuple[Slot, ...], tuple[int, ...]]:
    """Fuse every linear that has a slot with its packed weight; sites on one weight share one input.

    Returns the slots in the order of the new leading inputs, and the positions of the original inputs still read.
    """
    inputs = own_inputs(gm.graph)
    made: dict[Slot, fx.Node] = {}
    for node, slot in linears.items():
        if slot not in made:
            made[slot] = add_input(gm.graph, f"packed_{len(made)}", blobs[slot.site], fake_mode)
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


def _replace(node: fx.Node, packed: fx.Node, slot: Slot, fake_mode: FakeTensorMode) -> None:
    x, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    out_features = int(weight.meta["val"].shape[0])
    graph = node.graph
    with graph.inserting_before(node), fake_mode:
        if slot.scheme is None:
            fused = graph.call_function(torch.ops.fxquant.linear_float.default, (x, packed, bias, out_features))
        else:
            form = format_of(slot.scheme)
            source = x if slot.scheme.is_weight_only else x.args[0]  # what the fake-quant node reads
            static = x.args[1:3] if slot.scheme.static else ()  # the steps and the zero point of the fake-quant node
            args = (source, packed, bias, *static, out_features, *form.extra(slot.scheme))
            fused = graph.call_function(form.overload, args)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)
