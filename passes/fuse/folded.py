"""read(f(W, γ))  →  read(folded)

What reparameterization computes from weights alone is evaluated when weights are packed, not at each call: it becomes an
input of the graph that is bound as packed weights are. Where a float linear reads it, that is one more copy of its weight.
"""

from torch import Tensor, fx

from fxquant._compat import FakeTensorMode
from fxquant.binding import FrozenValue, Packed, Slot, declare_input, frozen_value, own_inputs
from fxquant.capture import remove_dead_code
from fxquant.schemes import LinearScheme


def bind_folded(
    gm: fx.GraphModule, fake_mode: FakeTensorMode, kept: tuple[int, ...]
) -> tuple[tuple[Slot, ...], tuple[int, ...]]:
    """Give every folded value that is read an input of its own; ``kept`` are the positions of the user's inputs in the graph.

    Returns a slot for each new input, in order, and the positions of the user's inputs still read.
    """
    inputs = own_inputs(gm.graph)
    slots = [_bind(node, kept, fake_mode) for node in list(gm.graph.nodes) if _is_folded(node) and _readers(node)]
    remove_dead_code(gm.graph)
    sources = {position for slot in slots for position in slot.weight.sources}
    still_kept = []
    for position, node in zip(kept, inputs, strict=True):
        if position in sources and not node.users:
            gm.graph.erase_node(node)
        else:
            still_kept.append(position)
    for vector in filter(_is_folded, gm.graph.find_nodes(op="placeholder")):
        gm.graph.erase_node(vector)
    gm.recompile()
    return tuple(slots), tuple(still_kept)


def _bind(node: fx.Node, kept: tuple[int, ...], fake_mode: FakeTensorMode) -> Slot:
    value = frozen_value(node)
    with fake_mode:
        fake = node.meta["val"].detach()
    made = declare_input(node.graph, f"folded_{node.name}", fake)
    made.meta["fxquant_frozen"] = True
    for reader in _readers(node):
        reader.replace_input_with(node, made)
    value = FrozenValue(tuple(kept[i] for i in value.sources), value.evaluate)
    return Slot(f"{node.name} (folded)", value, None, _as_it_is)


def _as_it_is(value: Tensor, scheme: LinearScheme | None) -> Packed:
    return Packed(value)


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if not _is_folded(user)]


def _is_folded(node: fx.Node) -> bool:
    return bool(node.meta.get("fxquant_folded"))
