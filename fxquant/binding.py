"""Packed weights as extra graph inputs, kept equal to the Parameters they come from.

A compiled graph owns one ``Binder``. At every call it looks at the identity, the version counter and the address of
each source Parameter; what changed since the last call is packed again before the graph runs. Nothing is baked into the
graph, so layers compiled one by one share it. Writes that PyTorch cannot see (``.data.add_``, NumPy views, inference
tensors) need ``fxquant.refresh``.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import FakeTensor, FakeTensorMode
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.site import Migration, StaticCoding, WeightCodes
from fxquant.schemes import LinearScheme


@dataclass(frozen=True)
class FrozenValue:
    """A weight as a pure function of graph inputs: ``evaluate`` maps the inputs at ``sources`` to its value."""

    sources: tuple[int, ...]
    evaluate: Callable[..., Tensor]

    def __call__(self, args: Sequence[Any]) -> Tensor:
        """The weight's value for the arguments of one call."""
        with torch.no_grad():
            return self.evaluate(*(args[i].detach() for i in self.sources))


@dataclass(frozen=True)
class Packed:
    """A packed weight with its error, or the sentence why it cannot be packed.

    ``correction`` [N] is what a shift of the input moves into the bias: the weight times it.
    """

    blob: Tensor | None
    sqnr_db: float | None = None
    reason: str | None = None
    correction: Tensor | None = None

    def without_contents(self) -> "Packed":
        """The same outcome with one byte that only has the blob's shape, for what must not keep weights alive."""
        return replace(self, blob=self.blob if self.blob is None else self.blob.new_empty(()).expand(self.blob.shape))


@dataclass(frozen=True)
class Slot:
    """One packed graph input: where its weight comes from and how it is coded.

    ``static`` is set for a static scheme, ``migration`` where a part of the input moves into the weight, ``codes`` where a
    calibration rounded it. Without a scheme the weight stays float32, in the panels that our float kernel reads.
    """

    site: str
    weight: FrozenValue
    scheme: LinearScheme | None
    pack: Callable[[Tensor, LinearScheme | None], Packed]
    static: StaticQParams | StaticCoding | None = None
    migration: Migration | None = None
    codes: WeightCodes | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the graph reads besides the packed weight, by name; qparams of a number format are called ``coding_<name>``."""
        static, moved = (part.inputs if part is not None else {} for part in (self.static, self.migration))
        prefix = "coding_" if isinstance(self.static, StaticCoding) else ""
        return {**{prefix + name: value for name, value in static.items()}, **moved}


@dataclass(frozen=True)
class Program:
    """One lowered graph: its callable, its own inputs (``leading_inputs``) and the positions of the user's inputs.

    ``fixed`` are inputs that belong to no weight: the qparams of attention.
    """

    run: Callable[..., Any]
    slots: tuple[Slot, ...]
    kept: tuple[int, ...]
    fixed: tuple[Tensor, ...] = ()


@dataclass
class _Entry:
    stamp: list[int]
    program: Program
    packed: tuple[Tensor, ...]
    keep: Callable[[Sequence[Any]], tuple[Any, ...]]
    aliases: list[Tensor]  # holds the storages, so that an address cannot come back with other contents
    owners: list[weakref.ref[Tensor]] = field(default_factory=list)


class Binder:
    """Calls a program with packed weights that match the arguments of each call.

    ``variant`` builds another program where some site's weight can no longer be packed (site → reason).
    ``on_bind`` hears of every new set of Parameters: (site → Packed, site → reason). ``others`` gives the binder that runs
    arguments with weights that the program is not for, else None.
    """

    def __init__(
        self,
        program: Program,
        variant: Callable[[dict[str, str]], Program],
        on_bind: Callable[[dict[str, Packed], Sequence[Tensor]], None],
        others: "Callable[[Sequence[Any]], Binder | None] | None" = None,
    ) -> None:
        self._program = program
        self._variant = variant
        self._on_bind = on_bind
        self._others = others
        self._variants: dict[tuple[str, ...], Program] = {}
        self._entries: dict[tuple[int, ...], _Entry] = {}
        self._lock = threading.RLock()
        positions = sorted({i for slot in program.slots for i in slot.weight.sources})
        self._watch = positions_getter(positions)

    def __call__(self, args: Sequence[Any]) -> Any:
        watched = self._watch(args)
        entry = self._entries.get(tuple(map(id, watched)))
        if entry is None or entry.stamp != _stamp(watched):
            entry = self.bind(args)
        return entry.program.run(*entry.packed, *entry.keep(args))

    def bind(self, args: Sequence[Any], ready: Mapping[str, Packed] | None = None) -> _Entry:
        """Pack what the arguments hold (``ready`` has results that are known already) and remember it."""
        with self._lock:
            watched = self._watch(args)
            stamp, key = _stamp(watched), tuple(map(id, watched))
            other = self._others(args) if self._others is not None else None
            if other is not None:
                self._entries[key] = entry = replace(other.bind(args), stamp=stamp)
                return entry
            packed = pack_slots(self._program.slots, args, ready or {})
            program = self._program_for({site: p.reason for site, p in packed.items() if p.reason is not None})
            packed |= pack_slots(program.slots, args, packed)  # what a variant reads instead of a packed weight
            entry = _Entry(
                stamp=stamp,
                program=program,
                packed=leading_inputs(program.slots, packed, program.fixed),
                keep=positions_getter(program.kept),
                aliases=[tensor.detach() for tensor in watched],
                owners=[weakref.ref(tensor, lambda _: self._entries.pop(key, None)) for tensor in watched],
            )
            self._on_bind(packed, watched)
            self._entries[key] = entry
            return entry

    def forget(self, ids: set[int]) -> None:
        """Drop what was packed from any tensor with one of these ids: it is packed again at the next call."""
        with self._lock:
            for key in [key for key in self._entries if ids.intersection(key)]:
                del self._entries[key]

    @property
    def resident_bytes(self) -> int:
        """Bytes of all packed weights that this graph holds."""
        return sum(blob.nbytes for entry in self._entries.values() for blob in entry.packed)

    def _program_for(self, reasons: dict[str, str]) -> Program:
        if not reasons:
            return self._program
        key = tuple(sorted(reasons))
        if key not in self._variants:
            self._variants[key] = self._variant(reasons)
        return self._variants[key]


def pack_slots(slots: Sequence[Slot], args: Sequence[Any], ready: Mapping[str, Packed]) -> dict[str, Packed]:
    """What every slot packs from the arguments of a call, by its site; what is ``ready`` is taken over."""
    return {slot.site: ready.get(slot.site) or slot.pack(slot.weight(args), slot.scheme) for slot in slots}


def leading_inputs(slots: Sequence[Slot], packed: Mapping[str, Packed], fixed: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
    """What a graph reads before the user's inputs: the vectors of each slot, what is fixed, then every packed weight and
    correction."""
    vectors = [value for slot in slots for value in slot.inputs.values()]
    outcomes = [packed[slot.site] for slot in slots]
    weights = [value for outcome in outcomes for value in (outcome.blob, outcome.correction) if value is not None]
    return (*vectors, *fixed, *weights)


def add_input(graph: fx.Graph, name: str, value: Tensor, fake_mode: FakeTensorMode) -> fx.Node:
    """A new input of a graph that stands before the user's own, after those added earlier."""
    return declare_input(graph, name, fake_mode.from_tensor(value, static_shapes=True))


def declare_input(graph: fx.Graph, name: str, value: FakeTensor) -> fx.Node:
    """``add_input`` for a value that is known by its fake tensor alone."""
    with graph.inserting_before(own_inputs(graph)[0]):
        node = graph.placeholder(name)
    node.meta["val"] = value
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node.meta["fxquant_name"] = name
    node.meta["fxquant_added"] = True
    node._dynamo_source = None
    return node


def own_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The inputs that a graph had from the start, in order."""
    return [node for node in graph.find_nodes(op="placeholder") if not node.meta.get("fxquant_added")]


def positions_getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """``args → (args[i] for i in positions)`` as fast as Python can."""
    if not positions:
        return lambda args: ()
    if len(positions) == 1:
        only = positions[0]
        return lambda args: (args[only],)
    return itemgetter(*positions)


_version, _address = Tensor._version.__get__, Tensor.data_ptr  # type: ignore[attr-defined]


def _stamp(tensors: Sequence[Tensor]) -> list[int]:
    """Version counters and addresses; on the path of every call, so without a Python loop."""
    try:
        return [*map(_version, tensors), *map(_address, tensors)]
    except RuntimeError:  # inference tensors have no version counter
        return [*(-1 if t.is_inference() else t._version for t in tensors), *map(_address, tensors)]


def frozen_value(node: fx.Node) -> FrozenValue:
    """The frozen value computed at a node, as a function of the user's inputs; vectors of a calibration are constants."""
    needed = _ancestors(node)
    inputs = own_inputs(node.graph)
    if node in inputs:
        return FrozenValue((inputs.index(node),), lambda value: value)
    sources = [p for p in inputs if p in needed]
    given = [p for p in node.graph.find_nodes(op="placeholder") if p in needed and "fxquant_value" in p.meta]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {p: graph.placeholder(p.name) for p in (*given, *sources)}
    for old in node.graph.nodes:
        if old in needed and old not in copies:
            copies[old] = graph.node_copy(old, lambda n: copies[n])
    graph.output(copies[node])
    root = node.graph.owning_module
    module = fx.GraphModule(root if root is not None else torch.nn.Module(), graph)
    vectors = [p.meta["fxquant_value"] for p in given]
    return FrozenValue(tuple(map(inputs.index, sources)), functools.partial(module, *vectors))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found = {node}
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found
