"""Gives operands of a match new values and leaves its operators where they are.

The new values are pure functions of weights, written into the graph before their reader: they are evaluated when weights
are packed, so nothing is baked in. Nodes keep their identity, and a plan that names them stays valid.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxquant._compat import make_fx, maybe_fake_mode
from fxquant.errors import RuleError

if TYPE_CHECKING:
    from fxquant.passes.match import Match

DISAGREE = "operators that read one value must agree on what is changed in it"


@dataclass(frozen=True)
class Place:
    """An argument of a node, by its name in the operator's schema."""

    node: fx.Node
    argument: str


@dataclass(frozen=True)
class Changes:
    """The traced new values of one match: a graph over ``inputs`` with an output for each tensor of ``values``."""

    match: "Match"
    body: fx.GraphModule
    inputs: Mapping[fx.Node, fx.Node]
    values: Mapping[str, Any]  # operand → node of the body, number or None

    def misfit(self) -> str | None:
        """Why a new value cannot stand where the old one stands, or None."""
        for name, value in self.values.items():
            if not self.match.places.get(name):
                return f"the rewrite changes {name}, which no matched operator reads"
            old = self.match.operands[name]
            if not isinstance(value, fx.Node) or not isinstance(old, fx.Node):
                continue
            before, after = (_kind(node.meta["val"]) for node in (old, value))
            if before != after:
                return f"the rewrite would change {name} from {before} to {after}"
        return None

    def sources(self, name: str) -> frozenset[Any]:
        """What a new value is made of: nodes of the graph and the shape of its computation."""
        value = self.values[name]
        if not isinstance(value, fx.Node):
            return frozenset([value])
        needed = _needed(value)
        made = tuple(str(node.target) for node in self.body.graph.nodes if node in needed and node not in self.inputs)
        return frozenset([made, *(self.inputs[node] for node in needed if node in self.inputs)])


def changes_of(match: "Match") -> Changes:
    """Trace the rewrite of a match whose rule reweights."""
    rewrite = match.rule.rewrite
    assert rewrite is not None
    tensors = {name: value for name, value in match.operands.items() if isinstance(value, fx.Node)}
    fixed = {name: value for name, value in match.operands.items() if name not in tensors}
    plain: dict[str, Any] = {}
    names: list[str] = []

    def call(*values: Tensor) -> list[Tensor]:
        changed = rewrite(**fixed, **dict(zip(tensors, values, strict=True)))
        made = {name: value for name, value in changed.items() if isinstance(value, Tensor)}
        plain.update({name: value for name, value in changed.items() if name not in made})
        names.extend(made)
        return list(made.values())

    values = [node.meta["val"] for node in tensors.values()]
    with maybe_fake_mode(values), torch.no_grad(), torch.autocast("cpu", enabled=False):
        body: fx.GraphModule = make_fx(call, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    if body.graph.find_nodes(op="get_attr"):
        raise RuleError(f"rule {match.rule.name}: the rewrite makes a constant tensor; use a number instead")
    inputs = dict(zip(body.graph.find_nodes(op="placeholder"), tensors.values(), strict=True))
    (results,) = body.graph.find_nodes(op="output")[0].args
    return Changes(match, body, inputs, {**plain, **dict(zip(names, results, strict=True))})


def disagreement(group: Iterable[Changes]) -> str | None:
    """Why matches that share operators cannot be changed together, or None."""
    seen: dict[Place, Any] = {}
    for changes in group:
        for name in changes.values:
            for place in changes.match.places[name]:
                if seen.setdefault(place, changes.sources(name)) != changes.sources(name):
                    return DISAGREE
    return None


def reweight(group: Iterable[Changes]) -> None:
    """Write the new values of one match, or of several that share operators, into the graph."""
    done: set[Place] = set()
    for changes in group:
        for name, value in changes.values.items():
            places = [place for place in changes.match.places[name] if place not in done]
            if not places:
                continue
            done.update(places)
            first = min(place.node for place in places)
            made = _copy(changes, name, value, first) if isinstance(value, fx.Node) else value
            for place in places:
                set_argument(place, made)


def set_argument(place: Place, value: Any) -> None:
    """Give a node another argument; those before it that were left out are filled in with their defaults."""
    node = place.node
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    index = [argument.name for argument in arguments].index(place.argument)
    if arguments[index].kwarg_only or place.argument in node.kwargs:
        node.kwargs = {**node.kwargs, place.argument: value}
        return
    missing = [argument.default_value for argument in arguments[len(node.args) : index + 1]]
    filled = [*node.args, *missing]
    filled[index] = value
    node.args = tuple(filled)


def write_value(function: Callable[..., Tensor], sources: Sequence[fx.Node], before: fx.Node, rule: str) -> fx.Node:
    """A new value before a node: a function of weights, written out operator by operator."""
    values = [source.meta["val"] for source in sources]
    with maybe_fake_mode(values), torch.no_grad(), torch.autocast("cpu", enabled=False):
        body: fx.GraphModule = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    (result,) = body.graph.find_nodes(op="output")[0].all_input_nodes
    copies = dict(zip(body.graph.find_nodes(op="placeholder"), sources, strict=True))
    return _write(body, result, copies, before, {"rule": rule})


def _copy(changes: Changes, name: str, value: fx.Node, before: fx.Node) -> fx.Node:
    needed = _needed(value)
    copies = {node: source for node, source in changes.inputs.items() if node in needed}
    note = {"rule": changes.match.rule.name, "changed": name}
    return _write(changes.body, value, copies, before, note)


def _write(
    body: fx.GraphModule, result: fx.Node, copies: dict[fx.Node, fx.Node], before: fx.Node, note: Mapping[str, str]
) -> fx.Node:
    late = [source.name for source in copies.values() if not source < before]
    if late:
        raise RuleError(f"{late[0]} is computed after {before.name}, which would read it")
    if not all(source.meta.get("fxquant_frozen", False) for source in copies.values()):
        raise RuleError("a new value would depend on more than weights")
    needed = _needed(result)
    with before.graph.inserting_before(before):
        for old in body.graph.nodes:
            if old not in needed or old in copies:
                continue
            made = before.graph.node_copy(old, lambda n: copies[n])
            made.meta = {key: held for key, held in before.meta.items() if key != "fxquant_vectors"}
            made.meta |= {"val": old.meta["val"], "fxquant_frozen": True, "fxquant": dict(note)}
            copies[old] = made
    return copies[result]


def _needed(node: fx.Node) -> set[fx.Node]:
    found, pending = {node}, [node]
    while pending:
        new = [source for source in pending.pop().all_input_nodes if source not in found]
        found.update(new)
        pending += new
    return found


def _kind(value: Tensor) -> str:
    return f"{value.dtype} {'×'.join(map(str, value.shape))}"
