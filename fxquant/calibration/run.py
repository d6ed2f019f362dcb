"""fxquant.calibrate: data through the recognised float graph, observers at the inputs of linears."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backend import analyse
from fxquant.binding import frozen_value
from fxquant.calibration.calibration import Calibration, SiteCalibration
from fxquant.calibration.observer import MinMaxObserver
from fxquant.calibration.qparams import choose_qparams
from fxquant.capture import compiled_call
from fxquant.config import FxQuantConfig, resolve_options
from fxquant.errors import CalibrationError
from fxquant.lowering.isa import current_isa
from fxquant.passes.quantize.linear import conditions
from fxquant.plan import resolve_scheme, setting_for
from fxquant.reporting.dump import Dumper
from fxquant.schemes import Scheme
from fxquant.sites import Site, find_sites
from fxquant.tracker import CompiledGraph

METHODS = ("minmax",)


def run(model: Callable[..., Any], batches: Iterable[Any], scheme: str, method: str, options: object) -> Calibration:
    """What ``fxquant.calibrate`` returns; memory does not grow with the number of batches."""
    if method not in METHODS:
        raise CalibrationError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    config = resolve_options({**_as_dict(options), "scheme": scheme, "calibration": None})
    recorder = _Recorder(config)
    call = compiled_call(model, recorder.backend)
    count = 0
    with torch.no_grad():
        for batch in batches:
            call(*_arguments(batch))
            count += 1
    if count == 0:
        raise CalibrationError("there is no batch to calibrate on")
    sites = recorder.finish()
    if not sites:
        raise CalibrationError("no linear that could be quantized ran on these batches")
    return Calibration(method, count, sites)


class _Recorder:
    """Observers and weights of every linear site, over all graphs of the model."""

    def __init__(self, config: FxQuantConfig) -> None:
        self._config = config
        self._observers: dict[str, MinMaxObserver] = {}
        self._weights: dict[str, tuple[Tensor, Scheme]] = {}

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """A Dynamo backend whose graphs run in float and report the inputs of their linears."""
        graph = CompiledGraph(gm, example_inputs, self._config, current_isa())
        captured = analyse(gm, example_inputs, graph, Dumper(None, graph.record.name))
        observing = {}
        for node, (site, *_) in find_sites(captured.gm.graph).items():
            scheme = self._scheme(node, site)
            if scheme is not None:
                weight = frozen_value(node.args[1])(example_inputs)  # type: ignore[arg-type]
                self._weights[site.name] = (weight, scheme)
                observing[node] = self._observers.setdefault(site.name, MinMaxObserver(site.name))
        return _Observing(captured.gm, observing).run

    def finish(self) -> dict[str, SiteCalibration]:
        """The qparams of every site that saw data."""
        found = {}
        for name, observer in self._observers.items():
            seen = observer.statistics()
            if seen is not None:
                weight, scheme = self._weights[name]
                qparams = choose_qparams(seen, weight.to(torch.float32), scheme.weight_bits, scheme.act_bits)
                found[name] = SiteCalibration(qparams, str(scheme), (weight.shape[0], weight.shape[1]))
        return found

    def _scheme(self, node: fx.Node, site: Site) -> Scheme | None:
        """The scheme that a linear would have; None where it stays float."""
        x, weight = (*node.args, None)[:2]
        if site.kind != "linear" or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
            return None
        scheme = resolve_scheme(setting_for(site, self._config), current_isa())
        return scheme if isinstance(scheme, Scheme) and all(holds for _, holds in conditions(x, weight)) else None


class _Observing(fx.Interpreter):
    """Runs a graph and shows each observer the input of its linear."""

    def __init__(self, gm: fx.GraphModule, observers: Mapping[fx.Node, MinMaxObserver]) -> None:
        super().__init__(gm)
        self._observing = observers

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        if n in self._observing:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._observing[n].observe(args[0])
        return super().run_node(n)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _as_dict(options: object) -> dict[str, Any]:
    if isinstance(options, FxQuantConfig):
        return {name: getattr(options, name) for name in options.model_fields_set}
    return dict(options) if isinstance(options, Mapping) else {}
