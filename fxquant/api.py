"""What a user calls: explain, report, calibrate and refresh."""

import types
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxquant.config import resolve_options
from fxquant.errors import ReportError

if TYPE_CHECKING:
    from fxquant.calibration.calibration import Calibration
    from fxquant.reporting.report import Report


def explain(model: Callable[..., Any], /, *args: Any, options: object = None, **kwargs: Any) -> "Report":
    """What ``backend="fxquant"`` would do with ``model(*args, **kwargs)`` under ``torch.no_grad()``.

    Nothing is compiled; the model runs once, in eager mode. ``options`` is what would be given to ``torch.compile``.

    Raises:
        ConfigError: an option is wrong, or a pattern of ``sites`` matches nothing.
        ReportError: Dynamo captured no graph at all.
    """
    from fxquant.backend import dry_run
    from fxquant.reporting.report import Report
    from fxquant.tracker import CompiledGraph

    config = resolve_options(options)
    graphs: list[CompiledGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(dry_run(gm, example_inputs, config))
        forward: Callable[..., Any] = gm.forward
        return forward

    target = getattr(model, "_orig_mod", model)
    # Dynamo keeps its cache on code objects: a fresh copy leaves the model's own compiled code alone.
    call = types.FunctionType(_call.__code__.replace(), _call.__globals__)
    with torch.no_grad():
        torch.compile(call, backend=backend)(target, args, kwargs)
    if not graphs:
        raise ReportError("explain: Dynamo captured no graph; there is no tensor operation it could read")
    return Report(tuple(graph.record for graph in graphs))


def report(compiled: Callable[..., Any]) -> "Report":
    """What happened to every graph of a compiled module or function; layers compiled one by one are found too.

    Raises:
        ReportError: nothing was compiled with ``backend="fxquant"`` for it, or it has not been called yet.
    """
    from fxquant.reporting.report import Report
    from fxquant.tracker import tracker

    names = _parameter_names(compiled)
    # Modules are known by their Parameters; many models share the code of one wrapper function.
    function = None if isinstance(compiled, torch.nn.Module) else compiled
    code = getattr(getattr(function, "_torchdynamo_orig_callable", function), "__code__", None)
    place = (code.co_filename, code.co_firstlineno) if code is not None else None
    records = [
        record
        for graph in tracker().graphs()
        for record in (graph.records_for(None) if place == graph.code else graph.records_for(names))
    ]
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
    options: object = None,
) -> "Calibration":
    """Static activation ranges for the linears of ``model`` from data, for ``options={"calibration": ...}``.

    A batch is a tensor, a tuple (positional arguments) or a mapping (keyword arguments); batches are seen once, one after
    the other, in float and without gradients. ``scheme`` and the ``sites`` of ``options`` give the widths. ``method`` is
    ``minmax``.

    Raises:
        CalibrationError: the method is unknown, there is no batch, no linear ran, or an input is not finite.
        ConfigError: an option or the scheme is wrong.
    """
    from fxquant.calibration.run import run

    return run(model, batches, scheme, method, options)


def refresh(model: torch.nn.Module) -> None:
    """Have every weight of ``model`` packed again before the next call.

    Needed only after writes that PyTorch cannot see: ``.data.add_()``, NumPy views, weights made in inference mode.
    """
    from fxquant.tracker import tracker

    ids = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for graph in tracker().graphs():
        graph.forget(ids)


def _call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return target(*args, **kwargs)


def _parameter_names(compiled: Callable[..., Any]) -> dict[int, str]:
    module = getattr(compiled, "_orig_mod", compiled)
    if not isinstance(module, torch.nn.Module):
        return {}
    named = [*module.named_parameters(), *module.named_buffers()]
    return {id(tensor): name.replace("_orig_mod.", "") for name, tensor in named}
