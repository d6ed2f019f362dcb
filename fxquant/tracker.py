"""What is compiled and alive: one ``CompiledGraph`` a graph, kept by its runner, so that reports can find it.

The tracker holds weak references only: a graph that Dynamo drops leaves no trace.
"""

import functools
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import frame_fields
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
        self.code = (code["co_filename"], code["co_firstlineno"])
        self.is_partial = _is_partial(gm, code["co_name"])
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
            replace(row, scheme=None, reason=sentence, error_class=None, bytes_after=0) if row.scheme else row
            for row in self.record.sites
        )
        self.note(sentence, sites=rows, rewrites=(), mode="training" if training else "inference")

    def on_bind(self, packed: dict[str, Packed], tensors: Sequence[Tensor]) -> None:
        """Remember a set of Parameters that the graph was bound to."""
        key = tuple(map(id, tensors))
        outcomes = {site: result.without_contents() for site, result in packed.items()}
        self.bound[key] = ([weakref.ref(tensor) for tensor in tensors], outcomes)

    def forget(self, ids: set[int]) -> None:
        """Drop every packed weight that was made from one of the tensors with these ids."""
        if self.binder is not None:
            self.binder.forget(ids)

    def records_for(self, names: dict[int, str] | None) -> list[GraphRecord]:
        """One record a bound set of Parameters among ``names`` (id → name; None: all of them)."""
        if not self.bound:
            mine = {id(p) for ref in self._parameters if (p := ref()) is not None}
            return [self.record] if names is None or mine & names.keys() else []
        found = []
        for refs, packed in self.bound.values():
            tensors = [tensor for ref in refs if (tensor := ref()) is not None]
            if not tensors or (names is not None and not any(id(tensor) in names for tensor in tensors)):
                continue
            rows = tuple(_rebound(row, packed) for row in self.record.sites)
            prefix = _common_prefix([names[id(t)] for t in tensors if id(t) in names]) if names else ""
            found.append(replace(self.record, sites=rows, bound_to=prefix))
        return found


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
        """Every live graph."""
        return list(self._graphs)

    def has_partial(self, config: FxQuantConfig) -> bool:
        """Whether some graph of this config is only a part of its function (a graph break)."""
        return any(graph.is_partial and graph.config == config for graph in self._graphs)


@functools.cache
def tracker() -> Tracker:
    """The tracker of this process."""
    return Tracker()


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
    return SiteRow(
        name=site.name,
        kind=site.kind,
        shapes=site.shapes,
        weight=site.weight,
        scheme=str(decision.scheme) if decision.scheme else None,
        reason=decision.reason,
        error_class="QUANTIZED" if decision.scheme else None,
        weight_sqnr_db=packed.sqnr_db if packed else None,
        bytes_before=value.numel() * value.element_size() if value is not None else 0,
        bytes_after=blob.numel() if blob is not None and slot is not None and slot.site == site.name else 0,
        macs=_macs(node, value),
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
        return replace(row, scheme=None, reason=result.reason, error_class=None, weight_sqnr_db=result.sqnr_db)
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
