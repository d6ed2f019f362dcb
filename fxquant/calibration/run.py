"""fxquant.calibrate: data through the recognised float graph, observers at the inputs of linears."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.calibration.calibration import Calibration
from fxquant.calibration.observer import MinMaxObserver
from fxquant.calibration.qparams import choose_qparams
from fxquant.calibration.site import SiteCalibration
from fxquant.calibration.study import LinearSite, Study
from fxquant.config import FxQuantConfig, resolve_options
from fxquant.errors import CalibrationError
from fxquant.schemes import Scheme

METHODS = ("minmax",)


def run(model: Callable[..., Any], batches: Iterable[Any], scheme: str, method: str, options: object) -> Calibration:
    """What ``fxquant.calibrate`` returns; memory does not grow with the number of batches."""
    if method not in METHODS:
        raise CalibrationError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    config = resolve_options({**_as_dict(options), "scheme": scheme, "calibration": None})
    study = Study(model, config)
    observers: dict[str, MinMaxObserver] = {}

    def watch(name: str, x: Tensor) -> None:
        if study.sites[name].scheme is not None:
            observers.setdefault(name, MinMaxObserver(name)).observe(x)

    study.watch = watch
    count = 0
    for batch in batches:
        study(batch)
        count += 1
    if count == 0:
        raise CalibrationError("there is no batch to calibrate on")
    found = {name: _site(study.sites[name], observer) for name, observer in observers.items()}
    sites = {name: site for name, site in found.items() if site is not None}
    if not sites:
        raise CalibrationError("no linear that could be quantized ran on these batches")
    return Calibration(method, count, sites)


def _site(site: LinearSite, observer: MinMaxObserver) -> SiteCalibration | None:
    """The qparams of a site; None where it saw no data or has no activations to code."""
    seen, scheme = observer.statistics(), site.scheme
    if seen is None or not isinstance(scheme, Scheme) or scheme.is_weight_only:
        return None
    qparams = choose_qparams(seen, site.weight.to(torch.float32), scheme.weight_bits, scheme.act_bits)
    return SiteCalibration(str(scheme), site.shape, qparams, is_explicit=site.is_explicit)


def _as_dict(options: object) -> dict[str, Any]:
    if isinstance(options, FxQuantConfig):
        return {name: getattr(options, name) for name in options.model_fields_set}
    return dict(options) if isinstance(options, Mapping) else {}
