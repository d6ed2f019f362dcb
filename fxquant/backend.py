"""The compiler: ``torch.compile(model, backend="fxquant")`` ends up in ``fxquant`` below. One named line a stage.

capture → recognise → reparameterize → plan → quantize → fuse → lower; data flows down and never back. Whatever a stage
cannot do leaves the site, or the whole graph, in float with a reason in the record that ``fxquant.report`` shows.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxquant import ops
from fxquant._compat import DYNAMO_CONTROL_FLOW, FakeTensorMode, check_torch, compile_fx
from fxquant.binding import Binder, Packed, Program, Slot, leading_inputs, pack_slots, positions_getter
from fxquant.calibration.sources import ANOTHER, Owned, own_vectors, without_approximations
from fxquant.capture import Captured, capture
from fxquant.checks import check_calibration, check_patterns
from fxquant.config import FxQuantConfig, environment, resolve_options
from fxquant.errors import FloatFallbackWarning, GradModeWarning, KernelBuildError
from fxquant.lowering.cpu.build import load_library
from fxquant.lowering.inductor import register
from fxquant.lowering.isa import current_isa
from fxquant.lowering.salt import cache_salt, float_salt
from fxquant.passes.fuse import FUSIONS
from fxquant.passes.fuse.folded import bind_folded
from fxquant.passes.fuse.fusion import Verdict
from fxquant.passes.fuse.linear import fuse_linears
from fxquant.passes.fuse.rows import fuse_rows
from fxquant.passes.quantize.linear import add_slot_inputs, quantize_linear
from fxquant.passes.recognise import recognise
from fxquant.passes.reparam import reparameterize
from fxquant.passes.rule import Event
from fxquant.passes.verify import verify
from fxquant.planning import Planned, float_plan, make_plan
from fxquant.reporting.dump import Dumper
from fxquant.reporting.logs import setup_logging
from fxquant.sites import find_sites, kind_of
from fxquant.tracker import CompiledGraph, tracker

log_passes = logging.getLogger("fxquant.passes")
log_plan = logging.getLogger("fxquant.plan")
log_kernels = logging.getLogger("fxquant.kernels")
Runner = Callable[..., Any]
GRADIENTS = (
    "gradients are enabled, so the graph stays float and differentiable; run it under torch.no_grad() or "
    "torch.inference_mode(), or set the option assume_inference=True"
)
OPERATORS = ops.LIBRARY  # importing ops defines the fxquant:: operators


def fxquant(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: object = None, mode: str | None = None) -> Runner:
    """The Dynamo backend: a callable that computes what ``gm`` computes, quantized where the plan says so.

    Raises:
        ConfigError: an option, a scheme, a pattern, the mode or an environment variable is wrong.
        CalibrationError: the calibration's file cannot be read, or is that of another model.
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
        captured, _ = analyse(gm, example_inputs, graph, Dumper(None, graph.record.name))
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
    _refuse_training(gm, args, graph)
    captured, owned = analyse(gm, args, graph, dumper)
    problem = _load_kernels()
    planned = plan(captured, args, graph, dry_run=problem is not None)
    if problem is not None:
        raise _StayFloat(problem, FloatFallbackWarning)
    if planned.changes_nothing and not graph.is_reparameterized:
        raise _StayFloat("nothing was quantized: the graph is compiled as it came")
    try:
        lowered = _lower(captured, planned, graph.config.chains, graph, dumper)
        packed = pack_slots(lowered.slots, args, planned.packed)
        program = _generate(lowered, packed, args, graph)
    except DYNAMO_CONTROL_FLOW:
        raise
    except Exception as error:
        raise _StayFloat(f"lowering failed: {_one_line(error)}", FloatFallbackWarning) from error

    later = _generated_later(captured, planned.without_contents(), graph)
    others = None if not owned.weights else _for_other_weights(gm, args, graph, owned)
    graph.binder = binder = Binder(program, later, graph.on_bind, others)
    binder.bind(args, ready=packed)

    def run(*values: Any) -> Any:
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            return binder(values)

    return run


def _generated_later(captured: Captured, outline: Planned, graph: CompiledGraph) -> Callable[[Mapping[str, str]], Program]:
    """Programs without the sites of some reasons, for weights that are not those of the first compilation."""

    def variant(reasons: Mapping[str, str]) -> Program:
        other = _lower(captured, outline.without(reasons), graph.config.chains, None, None)
        return Program(_generate_later(other.gm, graph), other.slots, other.kept, other.fixed)

    return variant


def _for_other_weights(
    gm: fx.GraphModule, args: Sequence[Any], graph: CompiledGraph, owned: Owned
) -> Callable[[Sequence[Any]], Binder | None]:
    """What runs arguments with other weights than those that vectors belong to: the same graph without such vectors."""
    given = graph.config.calibration
    assert given is not None
    calibration = replace(given, vectors=without_approximations(given.vectors))
    plain = CompiledGraph(gm, args, graph.config.model_copy(update={"calibration": calibration}), graph.isa)
    captured, _ = analyse(gm, args, plain, Dumper(None, graph.record.name))
    outline = make_plan(captured.gm, plain.config, plain.isa, args, dry_run=False).without_contents()
    later = _generated_later(captured, outline, graph)
    binder = Binder(later({}), later, graph.on_bind)
    sentence = f"reparameterize: low_rank {ANOTHER}, in a layer that shares this graph or was changed"

    def other(values: Sequence[Any]) -> Binder | None:
        if owned.fits(values):
            return None
        if sentence not in graph.record.notes:
            graph.note(sentence)
        return binder

    return other


def analyse(gm: fx.GraphModule, args: Sequence[Any], graph: CompiledGraph, dumper: Dumper) -> tuple[Captured, Owned]:
    """capture, recognise and reparameterize. A graph that cannot be read must compile as if fxquant were not there."""
    try:
        with graph.stage("capture", gm) as made:
            captured = capture(gm, args)
            made.append(captured.gm)
        dumper.stage("capture", captured.gm)
        with graph.stage("recognise", captured.gm):
            _record("recognise", recognise(captured.gm), graph)
            verify(captured.gm, "recognise")
        dumper.stage("recognise", captured.gm)
    except DYNAMO_CONTROL_FLOW:
        raise
    except Exception as error:
        raise _StayFloat(f"the graph cannot be read: {_one_line(error)}", FloatFallbackWarning) from error
    try:
        owned = _reparameterize(captured, args, graph, dumper)
    except DYNAMO_CONTROL_FLOW:
        raise
    except Exception as error:
        raise _StayFloat(f"reparameterizing failed: {_one_line(error)}", FloatFallbackWarning) from error
    return captured, owned


def _reparameterize(captured: Captured, args: Sequence[Any], graph: CompiledGraph, dumper: Dumper) -> Owned:
    """The folds that options or calibration name, and the rules that the calibration has vectors for, in the graph itself."""
    calibration, names = graph.config.calibration, graph.config.folds
    if calibration is None and not names:
        return Owned({})
    sites = {site.name: node for node, found in find_sites(captured.gm.graph).items() for site in found}
    owned = own_vectors(calibration.vectors if calibration is not None else {}, sites, args)
    for name, site in owned.left_out:
        graph.note(f"reparameterize: {name} at {site} {ANOTHER}")
    if not names and not owned.vectors:
        return owned
    with graph.stage("reparameterize", captured.gm):
        events = reparameterize(captured.gm, sites, owned.vectors, names)
        _record("reparameterize", events, graph)
        for name in sorted({*names} - {event.rule.name for event in events}):
            graph.note(f"reparameterize: {name} finds nothing to change here")
        verify(captured.gm, "reparameterize")
    dumper.stage("reparameterize", captured.gm)
    return owned


def _record(stage: str, events: Sequence[Event], graph: CompiledGraph) -> None:
    graph.add_rewrites(stage, events)
    for event in events:
        log_passes.info("%s at %s: %s", event.rule.title, event.node_name, getattr(event, "sentence", "fired"))


def plan(captured: Captured, args: Sequence[Any], graph: CompiledGraph, dry_run: bool) -> Planned:
    """Every candidate site gets a scheme or a reason."""
    with graph.stage("plan", captured.gm):
        planned = make_plan(captured.gm, graph.config, graph.isa, args, dry_run)
        check_patterns(tuple(decision.site for decision in planned.plan.decisions), args, graph)
        check_calibration(planned, graph)
    graph.set_plan(planned)
    log_plan.info("%s:\n%s", graph.record.place, planned.plan)
    return planned


@dataclass(frozen=True)
class _Lowered:
    gm: fx.GraphModule
    slots: tuple[Slot, ...]
    kept: tuple[int, ...]
    fixed: tuple[torch.Tensor, ...]


def _lower(captured: Captured, planned: Planned, chains: bool, graph: CompiledGraph | None, dumper: Dumper | None) -> _Lowered:
    """quantize and fuse, on a copy: the recognised graph stays as it is for variants."""
    gm, copies = _copy_graph(captured.gm)
    stage = graph.stage if graph is not None else _untimed
    with stage("quantize", gm):
        inputs = add_slot_inputs(gm.graph, planned.slots.values(), captured.fake_mode)
        linears = {
            quantize_linear(copies[planned.nodes[site]], slot, inputs.get(slot, {}), captured.fake_mode): slot
            for site, slot in planned.slots.items()
        }
        verify(gm, "quantize")
    if dumper is not None:
        dumper.stage("quantize", gm)
    with stage("fuse", gm):
        fixed: list[torch.Tensor] = []
        for node, verdict in planned.verdicts.items():
            problem = _fuse_other(copies[node], verdict, captured.fake_mode)
            if problem is None and verdict.calibrated is not None:
                fixed += verdict.calibrated.tensors().values()
            if problem is not None and graph is not None:
                graph.keep_operator([site for site, of in planned.nodes.items() if of is node], problem)
        slots, kept = fuse_linears(gm, captured.fake_mode, linears, planned.packed)
        folded, kept = bind_folded(gm, captured.fake_mode, kept)
        made = fuse_rows(gm, captured.fake_mode) if chains else []
        if graph is not None:
            graph.add_chains("fuse", made)
        verify(gm, "fuse")
    if dumper is not None:
        dumper.stage("fuse", gm)
    return _Lowered(gm, (*slots, *folded), kept, tuple(fixed))


def _fuse_other(node: fx.Node, verdict: Verdict, fake_mode: FakeTensorMode) -> str | None:
    """Replace one node that is no linear by our operator; the sentence why it keeps its own, or None."""
    try:
        FUSIONS[str(kind_of(node))].fuse(node, verdict, fake_mode)
    except Exception as error:  # nothing that a fusion does may cost the user more than this site
        log_passes.info("%s keeps its own operator: %s", node.name, error)
        return f"fusing it failed: {_one_line(error)}"
    return None


def _generate(lowered: _Lowered, packed: Mapping[str, Packed], args: Sequence[Any], graph: CompiledGraph) -> Program:
    """Code for the fused graph: through Inductor, or the graph itself with ``codegen="ops"``."""
    with graph.stage("lower", lowered.gm):
        if graph.config.codegen == "ops":
            return Program(lowered.gm.forward, lowered.slots, lowered.kept, lowered.fixed)
        register()
        inputs = [*leading_inputs(lowered.slots, packed, lowered.fixed), *(args[i] for i in lowered.kept)]
        with torch.no_grad():
            run = compile_fx(lowered.gm, inputs, cache_salt(graph.isa, graph.config.inductor))
        return Program(run, lowered.slots, lowered.kept, lowered.fixed)


def _generate_later(gm: fx.GraphModule, graph: CompiledGraph) -> Runner:
    """Code for a variant, made at its first call: no compilation runs any more, so the arguments are its example."""
    if graph.config.codegen == "ops":
        return gm.forward

    def generate(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Runner:
        try:
            with torch.no_grad():
                return compile_fx(graph_module, inputs, cache_salt(graph.isa, graph.config.inductor))
        except Exception as error:
            sentence = f"a layer that shares this graph runs without Inductor: {_one_line(error)}"
            graph.note(sentence)
            warnings.warn(f"fxquant: {graph.record.place}: {sentence}", FloatFallbackWarning, stacklevel=2)
            return graph_module.forward

    # Symbolic sizes are guarded by Dynamo for the first program only: the variant gets guards of its own.
    symbolic = any(not isinstance(node.meta["val"], torch.Tensor) for node in gm.graph.find_nodes(op="placeholder"))
    lock, made = threading.Lock(), list[Runner]()

    def run(*values: Any) -> Any:
        if not made:
            with lock:
                if not made:
                    made.append(torch.compile(gm, backend=generate) if symbolic else generate(gm, values))
        return made[0](*values)

    return run


def _compile_float(gm: fx.GraphModule, args: Sequence[Any], graph: CompiledGraph, refusal: _StayFloat) -> Runner:
    """The graph as it came, through Inductor (or run as it is with ``codegen="ops"``)."""
    graph.stay_float(str(refusal))
    log_passes.info("%s stays float: %s", graph.record.place, refusal)
    if refusal.warning is not None:
        warnings.warn(f"fxquant: {graph.record.place}: {refusal}", refusal.warning, stacklevel=2)
    run = gm.forward if graph.config.codegen == "ops" else compile_fx(gm, args, float_salt(graph.config.inductor))

    weights = positions_getter([i for i, arg in enumerate(args) if isinstance(arg, torch.nn.Parameter)])

    def runner(*values: Any) -> Any:
        tensors = weights(values)
        if tensors and tuple(map(id, tensors)) not in graph.bound:
            graph.on_bind({}, tensors)  # layers compiled one by one share float graphs too, and reports ask for each
        return run(*values)

    return runner


def _refuse_training(gm: fx.GraphModule, args: Sequence[Any], graph: CompiledGraph) -> None:
    if torch.is_grad_enabled() and not graph.config.assume_inference:
        _list_sites(gm, args, graph)
        raise _StayFloat(GRADIENTS, GradModeWarning)


def _list_sites(gm: fx.GraphModule, args: Sequence[Any], graph: CompiledGraph) -> None:
    """Name every site of a graph that is compiled for training; nothing else is decided about it."""
    try:
        with torch.no_grad():
            captured, _ = analyse(gm, args, graph, Dumper(None, graph.record.name))
        graph.set_plan(float_plan(captured.gm, GRADIENTS))
    except DYNAMO_CONTROL_FLOW:
        raise
    except Exception as problem:
        graph.note(f"its sites are not listed: {_one_line(problem)}")


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
