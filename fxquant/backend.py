"""The compiler: ``torch.compile(model, backend="fxquant")`` ends up in ``fxquant`` below. One named line a stage.

capture → recognise → plan → quantize → fuse → lower; data flows down and never back. Whatever a stage cannot do leaves
the site, or the whole graph, in float with a reason in the record that ``fxquant.report`` shows.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxquant import ops
from fxquant._compat import DYNAMO_CONTROL_FLOW, check_torch, compile_fx
from fxquant.binding import Binder, Packed, Program, Slot
from fxquant.capture import Captured, capture
from fxquant.config import FxQuantConfig, environment, resolve_options
from fxquant.errors import FloatFallbackWarning, GradModeWarning, KernelBuildError
from fxquant.lowering.cpu.build import load_library
from fxquant.lowering.inductor import register
from fxquant.lowering.isa import current_isa
from fxquant.lowering.salt import cache_salt
from fxquant.passes.fuse.linear import fuse_linears
from fxquant.passes.fuse.rows import fuse_rows
from fxquant.passes.quantize.linear import quantize_linear
from fxquant.passes.recognise import recognise
from fxquant.passes.verify import verify
from fxquant.plan import check_patterns
from fxquant.planning import Planned, make_plan
from fxquant.reporting.dump import Dumper
from fxquant.reporting.logs import setup_logging
from fxquant.tracker import CompiledGraph, tracker

log_passes = logging.getLogger("fxquant.passes")
log_plan = logging.getLogger("fxquant.plan")
log_kernels = logging.getLogger("fxquant.kernels")
Runner = Callable[..., Any]
OPERATORS = ops.LIBRARY  # importing ops defines the fxquant:: operators


def fxquant(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: object = None, mode: str | None = None) -> Runner:
    """The Dynamo backend: a callable that computes what ``gm`` computes, quantized where the plan says so.

    Raises:
        ConfigError: an option, a scheme, a pattern, the mode or an environment variable is wrong.
        UnsupportedTorchError: this torch release was never tested (``try_unsupported_torch`` goes on).
    """
    config = resolve_options(options, mode)
    check_torch(config.try_unsupported_torch)
    setup_logging(environment().logs)
    graph = tracker().start(gm, example_inputs, config, current_isa())
    dumper = Dumper(config.dump or environment().dump, graph.record.name)
    try:
        runner = _compile(gm, example_inputs, graph, dumper)
    except _StayFloat as refusal:
        runner = _compile_float(gm, example_inputs, graph, refusal)
    dumper.record(graph.record)
    runner.fxquant_graph = graph  # type: ignore[attr-defined]  # the runner keeps the record alive
    return runner


def dry_run(gm: fx.GraphModule, example_inputs: Sequence[Any], config: FxQuantConfig) -> CompiledGraph:
    """The record of what would happen to a graph; nothing is packed, lowered or kept."""
    check_torch(config.try_unsupported_torch)
    graph = CompiledGraph(gm, example_inputs, config, current_isa())
    graph.record = replace(graph.record, codegen="none")
    try:
        captured = analyse(gm, example_inputs, graph, Dumper(None, graph.record.name))
        plan(captured, example_inputs, graph, dry_run=True)
    except _StayFloat as refusal:
        graph.stay_float(str(refusal))
    return graph


class _StayFloat(Exception):
    """Why the whole graph stays float; ``warning`` is set where the user should hear of it at once."""

    def __init__(self, reason: str, warning: type[UserWarning] | None = None) -> None:
        super().__init__(reason)
        self.warning = warning


def _compile(gm: fx.GraphModule, args: Sequence[Any], graph: CompiledGraph, dumper: Dumper) -> Runner:
    _refuse_training(graph)
    captured = analyse(gm, args, graph, dumper)
    problem = _load_kernels()
    planned = plan(captured, args, graph, dry_run=problem is not None)
    if problem is not None:
        raise _StayFloat(problem, FloatFallbackWarning)
    if not planned.slots:
        raise _StayFloat("nothing was quantized: the graph is compiled as it came")
    try:
        lowered = _lower(captured, planned, graph.config.chains, graph, dumper)
        program = _generate(lowered, planned.packed, args, graph)
    except DYNAMO_CONTROL_FLOW:
        raise
    except Exception as error:
        raise _StayFloat(f"lowering failed: {_one_line(error)}", FloatFallbackWarning) from error

    outline, chains = planned.without_contents(), graph.config.chains

    def variant(reasons: Mapping[str, str]) -> Program:
        other = _lower(captured, outline.without(reasons), chains, None, None)
        return Program(other.gm.forward, other.slots, other.kept)

    graph.binder = binder = Binder(program, variant, graph.on_bind)
    binder.bind(args, ready=planned.packed)

    def run(*values: Any) -> Any:
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            return binder(values)

    return run


def analyse(gm: fx.GraphModule, args: Sequence[Any], graph: CompiledGraph, dumper: Dumper) -> Captured:
    """capture and recognise. A graph that cannot be read must compile as if fxquant were not there."""
    try:
        with graph.stage("capture", gm) as made:
            captured = capture(gm, args)
            made.append(captured.gm)
        dumper.stage("capture", captured.gm)
        with graph.stage("recognise", captured.gm):
            events = recognise(captured.gm)
            graph.add_rewrites("recognise", events)
            for event in events:
                log_passes.info("%s at %s: %s", event.rule.title, event.node_name, getattr(event, "sentence", "fired"))
            verify(captured.gm, "recognise")
        dumper.stage("recognise", captured.gm)
    except DYNAMO_CONTROL_FLOW:
        raise
    except Exception as error:
        raise _StayFloat(f"the graph cannot be read: {_one_line(error)}", FloatFallbackWarning) from error
    return captured


def plan(captured: Captured, args: Sequence[Any], graph: CompiledGraph, dry_run: bool) -> Planned:
    """Every candidate site gets a scheme or a reason."""
    with graph.stage("plan", captured.gm):
        planned = make_plan(captured.gm, graph.config, graph.isa, args, dry_run)
        if not (graph.is_partial or tracker().has_partial(graph.config)):
            check_patterns(graph.config, tuple(d.site for d in planned.plan.decisions))
    graph.set_plan(planned)
    log_plan.info("%s:\n%s", graph.record.place, planned.plan)
    return planned


@dataclass(frozen=True)
class _Lowered:
    gm: fx.GraphModule
    slots: tuple[Slot, ...]
    kept: tuple[int, ...]


def _lower(captured: Captured, planned: Planned, chains: bool, graph: CompiledGraph | None, dumper: Dumper | None) -> _Lowered:
    """quantize and fuse, on a copy: the recognised graph stays as it is for variants."""
    gm, copies = _copy_graph(captured.gm)
    stage = graph.stage if graph is not None else _untimed
    with stage("quantize", gm):
        linears = {
            quantize_linear(copies[planned.nodes[site]], slot.scheme, captured.fake_mode): slot
            for site, slot in planned.slots.items()
        }
        verify(gm, "quantize")
    if dumper is not None:
        dumper.stage("quantize", gm)
    with stage("fuse", gm):
        blobs = {site: packed.blob for site, packed in planned.packed.items() if packed.blob is not None}
        slots, kept = fuse_linears(gm, captured.fake_mode, linears, blobs)
        made = fuse_rows(gm, captured.fake_mode) if chains else []
        if graph is not None:
            graph.add_chains("fuse", made)
        verify(gm, "fuse")
    if dumper is not None:
        dumper.stage("fuse", gm)
    return _Lowered(gm, slots, kept)


def _generate(lowered: _Lowered, packed: Mapping[str, Packed], args: Sequence[Any], graph: CompiledGraph) -> Program:
    """Code for the fused graph: through Inductor, or the graph itself with ``codegen="ops"``."""
    with graph.stage("lower", lowered.gm):
        if graph.config.codegen == "ops":
            return Program(lowered.gm.forward, lowered.slots, lowered.kept)
        register()
        inputs = [*(packed[slot.site].blob for slot in lowered.slots), *(args[i] for i in lowered.kept)]
        with torch.no_grad():
            run = compile_fx(lowered.gm, inputs, cache_salt(graph.isa, graph.config.inductor))
        return Program(run, lowered.slots, lowered.kept)


def _compile_float(gm: fx.GraphModule, args: Sequence[Any], graph: CompiledGraph, refusal: _StayFloat) -> Runner:
    """The graph as it came, through Inductor (or run as it is with ``codegen="ops"``)."""
    graph.stay_float(str(refusal))
    log_passes.info("%s stays float: %s", graph.record.place, refusal)
    if refusal.warning is not None:
        warnings.warn(f"fxquant: {graph.record.place}: {refusal}", refusal.warning, stacklevel=2)
    run = gm.forward if graph.config.codegen == "ops" else compile_fx(gm, args, graph.config.inductor)

    def runner(*values: Any) -> Any:
        return run(*values)

    return runner


def _refuse_training(graph: CompiledGraph) -> None:
    if torch.is_grad_enabled() and not graph.config.assume_inference:
        raise _StayFloat(
            "gradients are enabled, so the graph stays float and differentiable; run it under torch.no_grad() or "
            "torch.inference_mode(), or set the option assume_inference=True",
            GradModeWarning,
        )


def _load_kernels() -> str | None:
    """Build or load the kernel library; the sentence why it cannot be had, or None."""
    try:
        path = load_library(environment().cache, environment().isa)
        log_kernels.info("kernel library %s, instruction set %s", path, current_isa())
    except KernelBuildError as error:
        return str(error)
    return None


def _copy_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, copies))
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    copy._param_name_to_source = gm._param_name_to_source
    for old, new in copies.items():
        if old.op == "placeholder":
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    return copy, copies


@contextlib.contextmanager
def _untimed(name: str, before: fx.GraphModule) -> Any:
    yield


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
