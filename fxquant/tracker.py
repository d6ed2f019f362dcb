"""What is compiled and alive: one ``CompiledGraph`` a graph, kept by its runner, so that reports can find it.

The tracker holds weak references only: a graph that Dynamo drops leaves no trace.
"""

import functools
import inspect
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import frame_fields, is_called_by_user_code
from fxquant.binding import Binder, Packed
from fxquant.config import FxQuantConfig
from fxquant.passes.fuse.rows import Chain
from fxquant.passes.rule import REAL, Event
from fxquant.planning import Planned
from fxquant.reporting.record import GraphRecord, RewriteRow, SiteRow, StageRow
from fxquant.sites import Site, clean_source


class CompiledGraph:
    """The record of one graph while it is compiled, and of every set of Parameters it is bound to afterwards."""

    def __init__(self, gm: fx.GraphModule, args: Sequence[Any], config: FxQuantConfig, isa: str) -> None:
        code = frame_fields()
        self.config = config
        self.isa = isa
        self._started = time.perf_counter()
        self._places = [(code["co_filename"], code["co_firstlineno"], code["co_name"]), *_callers()]
        self.is_partial = _is_partial(gm, code["co_name"]) or is_called_by_user_code()
        self.unmatched = list(config.sites)  # patterns that name no site of this graph
        self.record = GraphRecord(
            name=code["co_name"],
            place=f"{code['co_filename']}:{code['co_firstlineno']}",
            mode="inference",
            codegen=config.codegen,
            isa=isa,
            config=config,
        )
        self.bound: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], dict[str, Packed]]] = {}
        self.binder: Binder | None = None
        self._parameters = [weakref.ref(arg) for arg in args if isinstance(arg, torch.nn.Parameter)]

    @property
    def is_reparameterized(self) -> bool:
        """Whether a rule of the stage reparameterize fired."""
        return any(row.stage == "reparameterize" and row.fired for row in self.record.rewrites)

    def note(self, sentence: str, **changes: Any) -> None:
        """Add a sentence about the whole graph."""
        self.record = replace(self.record, notes=(*self.record.notes, sentence), **changes)

    @contextmanager
    def stage(self, name: str, before: fx.GraphModule) -> Iterator[list[fx.GraphModule]]:
        """Time a stage. The caller appends the graph it leaves behind where that is another one."""
        count, start = len(before.graph.nodes), time.perf_counter()
        made: list[fx.GraphModule] = []
        yield made
        after = len((made or [before])[-1].graph.nodes)
        row = StageRow(name, count, after, time.perf_counter() - start)
        self.record = replace(self.record, stages=(*self.record.stages, row))

    def add_rewrites(self, stage: str, events: Sequence[Event]) -> None:
        """Remember what rules did."""
        rows = tuple(
            RewriteRow(
                rule=event.rule.name,
                title=event.rule.title,
                node=event.node_name,
                stage=stage,
                error_class=str(event.rule.error_class),
                reason=getattr(event, "sentence", None),
            )
            for event in events
        )
        self.record = replace(self.record, rewrites=(*self.record.rewrites, *rows))

    def add_chains(self, stage: str, chains: Sequence[Chain]) -> None:
        """Remember which row-wise work became one operator."""
        rows = tuple(RewriteRow("rows", chain.title, chain.node_name, stage, REAL, chain.sentence) for chain in chains)
        self.record = replace(self.record, rewrites=(*self.record.rewrites, *rows))

    def set_plan(self, planned: Planned) -> None:
        """Remember the decision of every site."""
        rows = tuple(_site_row(decision.site, planned) for decision in planned.plan.decisions)
        self.record = replace(self.record, sites=rows)

    def stay_float(self, sentence: str) -> None:
        """The whole graph stays float: nothing that rules did reaches the user, and no site is quantized."""
        training = torch.is_grad_enabled() and not self.config.assume_inference
        rows = tuple(
            replace(row, scheme=None, reason=sentence, error_class=None, kernel=None, bytes_after=0)
            if row.kernel or row.scheme
            else row
            for row in self.record.sites
        )
        self.note(sentence, sites=rows, rewrites=(), mode="training" if training else "inference")

    def keep_operator(self, sites: Sequence[str], sentence: str) -> None:
        """Sites that a kernel of ours was to compute keep their own operator after all."""
        rows = tuple(
            replace(row, scheme=None, reason=sentence, error_class=None, kernel=None) if row.name in sites else row
            for row in self.record.sites
        )
        self.record = replace(self.record, sites=rows)

    def on_bind(self, packed: dict[str, Packed], tensors: Sequence[Tensor]) -> None:
        """Remember a set of Parameters that the graph was bound to, for as long as all of them live."""
        if not tensors:
            return  # no weight is packed: the graph runs for every caller alike
        key = tuple(map(id, tensors))
        outcomes = {site: result.without_contents() for site, result in packed.items()}
        this = weakref.ref(self)

        def drop(_: object) -> None:
            graph = this()
            if graph is not None:
                graph.bound.pop(key, None)

        self.bound[key] = ([weakref.ref(tensor, drop) for tensor in tensors], outcomes)

    def forget(self, ids: set[int]) -> None:
        """Drop every packed weight that was made from one of the tensors with these ids."""
        if self.binder is not None:
            self.binder.forget(ids)

    def is_part_of(self, code: types.CodeType) -> bool:
        """Whether this graph is of a function's code, follows a graph break in it, or was compiled for a call in it."""
        return any(_is_in(code, *place) for place in self._places)

    def records_for(self, names: dict[int, str], keep: Callable[[set[int]], bool]) -> list["BoundRecord"]:
        """One record a bound set of Parameters that ``keep`` takes by their identities; ``names`` are those of a module."""
        if not self.bound:
            mine = {id(p) for ref in self._parameters if (p := ref()) is not None}
            is_orphan = bool(self._parameters) and not mine  # nobody can call it any more
            return [BoundRecord(self.record, frozenset(mine))] if keep(mine) and not is_orphan else []
        found = []
        for refs, packed in list(self.bound.values()):
            ids = {id(tensor) for ref in refs if (tensor := ref()) is not None}
            if not ids or not keep(ids):
                continue
            rows = tuple(_rebound(row, packed) for row in self.record.sites)
            prefix = _common_prefix([name for key, name in names.items() if key in ids])
            found.append(BoundRecord(replace(self.record, sites=rows, bound_to=prefix), frozenset(ids)))
        return found


@dataclass(frozen=True)
class BoundRecord:
    """The record of a graph with one set of Parameters, by their identities."""

    record: GraphRecord
    parameters: frozenset[int]

    def replaces(self, other: "BoundRecord") -> bool:
        """Whether this is of the same code on the same weights as another one, compiled with other options."""
        mine, its = self.record, other.record
        same_code = (mine.place, mine.name) == (its.place, its.name)
        same_weights = self.parameters == other.parameters or not self.parameters.isdisjoint(other.parameters)
        return same_code and same_weights and mine.config != its.config


def latest(found: Sequence[BoundRecord]) -> list[GraphRecord]:
    """Of records in the order in which they were compiled those that no later compilation with other options replaced."""
    return [each.record for i, each in enumerate(found) if not any(later.replaces(each) for later in found[i + 1 :])]


class Tracker:
    """All compiled graphs that are alive."""

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()

    def start(self, gm: fx.GraphModule, args: Sequence[Any], config: FxQuantConfig, isa: str) -> CompiledGraph:
        """The record of a graph whose compilation starts now."""
        graph = CompiledGraph(gm, args, config, isa)
        self._graphs.add(graph)
        return graph

    def graphs(self) -> list[CompiledGraph]:
        """Every live graph, in the order in which they were compiled."""
        return sorted(self._graphs, key=lambda graph: graph._started)

    def still_unmatched(self, graph: CompiledGraph) -> list[str]:
        """The patterns that name no site of this graph nor of another graph of its function (another branch of it)."""
        family = [g for g in self._graphs if g._places[0] == graph._places[0] and g.config == graph.config]
        return [pattern for pattern in graph.unmatched if all(pattern in other.unmatched for other in family)]

    def has_partial(self, config: FxQuantConfig) -> bool:
        """Whether some graph of this config is only a part of what was compiled (a graph break)."""
        return any(graph.is_partial and graph.config == config for graph in self._graphs)


@functools.cache
def tracker() -> Tracker:
    """The tracker of this process."""
    return Tracker()


def _callers() -> list[tuple[str, int, str]]:
    """File, first line and name of every function that is running: a call behind a graph break is compiled on its own."""
    frame, found = inspect.currentframe(), []
    while frame is not None:
        code = frame.f_code
        found.append((code.co_filename, code.co_firstlineno, code.co_name))
        frame = frame.f_back
    return found


def _is_in(code: types.CodeType, file: str, line: int, name: str) -> bool:
    """Whether a place is a code's own, or that of what Dynamo made from it behind a graph break."""
    if file != code.co_filename:
        return False
    if name == code.co_name:
        return line == code.co_firstlineno
    last = max((number for *_, number in code.co_lines() if number is not None), default=line)
    return name.startswith(f"torch_dynamo_resume_in_{code.co_name}_at_") and code.co_firstlineno <= line <= last


def _is_partial(gm: fx.GraphModule, code_name: str) -> bool:
    reason = getattr(gm, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False)) or code_name.startswith("torch_dynamo_resume")


def _site_row(site: Site, planned: Planned) -> SiteRow:
    decision = planned.plan[site.name]
    node = planned.nodes[site.name]
    slot = planned.slots.get(site.name)
    packed = planned.packed.get(slot.site) if slot else planned.packed.get(site.name)
    weight = node.args[1] if site.kind == "linear" else None
    value = weight.meta["val"] if isinstance(weight, fx.Node) else None
    blob = packed.blob if packed else None
    timing = planned.timings.get(site.name)
    return SiteRow(
        name=site.name,
        kind=site.kind,
        shapes=site.shapes,
        weight=site.weight,
        scheme=str(decision.scheme) if decision.scheme else None,
        reason=decision.reason,
        float_us=timing.float_us if timing else None,
        own_float_us=timing.own_float_us if timing else None,
        scheme_us=timing.scheme_us if timing else None,
        error_class=decision.error_class,
        kernel=decision.kernel,
        weight_sqnr_db=packed.sqnr_db if packed else None,
        bytes_before=value.numel() * value.element_size() if value is not None else 0,
        bytes_after=blob.nbytes if blob is not None and slot is not None and slot.site == site.name else 0,
        macs=_macs(node, value),
        static_noise_db=slot.static.noise_db if slot is not None and slot.static is not None else None,
    )


def _macs(node: fx.Node, weight: Tensor | None) -> int | None:
    if weight is None or weight.dim() != 2:
        return None
    rows = node.meta["val"].numel()
    return rows * int(weight.shape[1]) if isinstance(rows, int) else None


def _rebound(row: SiteRow, packed: dict[str, Packed]) -> SiteRow:
    """The row of a site after its weight was packed again: a weight that cannot be packed any more is float."""
    result = packed.get(row.name)
    if result is None or row.scheme is None:
        return row
    if result.reason is not None:
        return replace(row, scheme=None, reason=result.reason, error_class=None, kernel=None, weight_sqnr_db=result.sqnr_db)
    return replace(row, weight_sqnr_db=result.sqnr_db)


def _common_prefix(names: list[str]) -> str:
    if not names:
        return ""
    parts = [name.split(".") for name in names]
    same = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        same.append(column[0])
    return clean_source(".".join(same))
