"""What a user calls: explain, report, calibrate, find_vectors, rank_errors and refresh."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxquant.config import override_options, resolve_options
from fxquant.errors import ReportError
from fxquant.reach import siblings, tensor_ids

if TYPE_CHECKING:
    from fxquant.budget import Budget
    from fxquant.calibration.calibration import Calibration
    from fxquant.calibration.files import Vectors
    from fxquant.calibration.ranking import Ranking
    from fxquant.reporting.report import Report
    from fxquant.tracker import BoundRecord, CompiledGraph


def explain(model: Callable[..., Any], /, *args: Any, options: object = None, **kwargs: Any) -> "Report":
    """What ``backend="fxquant"`` would do with ``model(*args, **kwargs)`` under ``torch.no_grad()``.

    Nothing is compiled; the model runs once, in eager mode. ``options`` is what would be given to ``torch.compile``.

    Raises:
        ConfigError: an option is wrong, or a pattern of ``sites`` matches nothing.
        ReportError: Dynamo captured no graph at all.
    """
    from fxquant.backend import dry_run
    from fxquant.capture import compiled_call
    from fxquant.reporting.report import Report
    from fxquant.tracker import CompiledGraph

    config = resolve_options(options)
    graphs: list[CompiledGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(dry_run(gm, example_inputs, config))
        forward: Callable[..., Any] = gm.forward
        return forward

    with torch.no_grad():
        compiled_call(model, backend)(args, kwargs)
    if not graphs:
        raise ReportError("explain: Dynamo captured no graph; there is no tensor operation it could read")
    return Report(tuple(graph.record for graph in graphs))


def report(compiled: Callable[..., Any]) -> "Report":
    """What happened to every graph of a compiled module or function; layers compiled one by one are found too.

    What was compiled more than once with different options is reported as it was compiled last.

    Raises:
        ReportError: nothing was compiled with ``backend="fxquant"`` for it, or it has not been called yet.
    """
    from fxquant.reporting.report import Report
    from fxquant.tracker import latest, tracker

    names = _parameter_names(compiled) if isinstance(compiled, torch.nn.Module) else {}
    if names:
        # Modules are known by their Parameters; many models share the code of one wrapper function.
        found = [r for graph in tracker().graphs() for r in graph.records_for(names, lambda ids: bool(ids & names.keys()))]
    else:
        module = getattr(compiled, "_orig_mod", compiled)
        function = module.forward if isinstance(module, torch.nn.Module) else compiled
        found = _function_records(getattr(function, "_torchdynamo_orig_callable", function))
    records = latest(found)
    if not records:
        raise ReportError(
            'report: no graph of this object was compiled with backend="fxquant"; call the compiled model once first'
        )
    return Report(tuple(records))


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    scheme: str = "auto",
    method: str = "minmax",
    budget: "Budget | None" = None,
    options: object = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    vectors: "Vectors | None" = None,
) -> "Calibration":
    """How to code the linears of ``model``, from data, for ``options={"calibration": ...}``.

    A batch is a tensor, a tuple (positional arguments) or a mapping (keyword arguments); batches are seen once, one after
    the other, in float and without gradients. ``scheme`` and the ``sites`` of ``options`` give the widths. A ``budget``
    gives every linear that ``sites`` does not name the fastest of several schemes that together keep it; it looks at the first
    twelve batches, at least two, and stands without ``scheme``, ``method`` and ``checkpoint``.

    ``method`` is a name of ``fxquant.calibration.recipes``: minmax, ema, percentile, mse, omse, kl; smoothquant, smoothquant+,
    awq, gptq, quarot, flexq, fireq, fpq; fq-vit, ptq4vit, repq, repquant, i&s, dopq, adalog, which code attention too; search
    and search-static (shift and factor of least predicted noise, then gptq), search-rotated (that after quarot's rotations); or
    one that rounds behind the quantized part of the model: gptaq, sequential, adaround, qdrop, and reconstruct,
    reconstruct-static and reconstruct-rotated (activations of the search of that name; after the rounding, scales are tuned
    against the float output, on every second batch, which the rounding does not see). Those, repquant and i&s keep all
    batches and need a model of one graph; their checkpoint holds the blocks that were done.

    ``seed`` chooses the rows that searches are made on. ``progress`` draws a bar with the time that is left. ``checkpoint``
    names a file that keeps what was seen when the run is stopped, by Ctrl-C or an error; called again with it and the same
    batches, the run goes on after the last batch that was seen.

    Raises:
        CalibrationError: the method is unknown, there is no batch (two for a budget), no linear ran, or an input is not
            finite.
        ConfigError: an option or the scheme is wrong.
    """
    from fxquant.calibration.run import run
    from fxquant.reporting.progress import drawn, silent

    with drawn() if progress else silent() as shown:
        file = Path(checkpoint) if checkpoint else None
        return run(model, batches, scheme, method, budget, options, seed, file, shown, vectors)


def find_vectors(
    model: Callable[..., Any], batches: Iterable[Any], settings: "Mapping[str, Any]", *, options: object = None
) -> "Vectors":
    """What migrations move between the weights of ``model``, from data, for ``calibrate(vectors=...)``.

    ``settings``: rule → its one number, or for ``low_rank`` pattern → rank: those of ``fxquant.calibration.vectors``, namely
    smooth, exponent_shift, one_scale, value_scale, rotary_scale and low_rank. All but low_rank keep the function; low_rank
    puts two thin linears in the place of one, an approximation with an error that the data tell.

    Raises:
        ConfigError: a rule is unknown, or its setting is none.
        CalibrationError: there is no batch, data are not finite, or a pattern names no linear.
    """
    from fxquant.calibration.vectors import find_vectors as find

    return find(model, batches, settings, options)


def rank_errors(
    model: Callable[..., Any], batches: Iterable[Any], *, scheme: str = "auto", options: object = None
) -> "Ranking":
    """The linears of ``model`` by the error that quantizing each of them causes, worst first, and which three to loosen.

    All batches are held in memory: a few are enough. Print it; ``loosen`` is what the option ``sites`` takes.

    Raises:
        CalibrationError: there is no batch, or no linear would be quantized.
        ConfigError: an option or the scheme is wrong.
    """
    from fxquant.calibration.ranking import rank

    return rank(model, batches, override_options(options, scheme=scheme))


def refresh(model: torch.nn.Module) -> None:
    """Have every weight of ``model`` packed again before the next call.

    Needed only after writes that PyTorch cannot see: ``.data.add_()``, NumPy views, weights made in inference mode.
    """
    from fxquant.tracker import tracker

    ids = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for graph in tracker().graphs():
        graph.forget(ids)


def _parameter_names(module: torch.nn.Module) -> dict[int, str]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {id(tensor): name.replace("_orig_mod.", "") for name, tensor in named}


def _function_records(function: Callable[..., Any]) -> "list[BoundRecord]":
    """The records of a function's graphs; functions that share one code are told apart by the weights they reach."""
    from fxquant.tracker import tracker

    code = getattr(function, "__code__", None)
    parts: dict[str, list[CompiledGraph]] = {}
    for graph in tracker().graphs():
        if code is not None and graph.is_part_of(code):
            parts.setdefault(f"{graph.record.place} {graph.record.name}", []).append(graph)
    own = tensor_ids(function)
    foreign = {key for other in (siblings(function) if parts else []) for key in tensor_ids(other)} - own
    return [record for graphs in parts.values() for record in _own_records(graphs, own, foreign)]


def _own_records(graphs: "list[CompiledGraph]", own: set[int], foreign: set[int]) -> "list[BoundRecord]":
    """Of all records of one part of a code those with weights in ``own``; where there is none, those not in ``foreign``."""
    if any(graph.records_for({}, lambda ids: bool(ids & own)) for graph in graphs):
        return [record for graph in graphs for record in graph.records_for({}, lambda ids: not ids or bool(ids & own))]
    return [record for graph in graphs for record in graph.records_for({}, lambda ids: not ids & foreign)]
