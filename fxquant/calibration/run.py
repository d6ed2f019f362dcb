"""fxquant.calibrate: data through the recognised float graph, observers at the inputs of linears."""

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from fxquant.budget import Budget
from fxquant.calibration.budgeting import CHECKED, PROBED, keep_budget
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.observer import MinMaxObserver
from fxquant.calibration.qparams import choose_qparams
from fxquant.calibration.site import SiteCalibration
from fxquant.calibration.study import LinearSite, Study
from fxquant.config import override_options
from fxquant.errors import CalibrationError
from fxquant.schemes import Scheme

METHODS = ("minmax",)
Progress = Callable[[str, int, int | None], None]  # (what, how many are done, of how many)


def run(
    model: Callable[..., Any],
    batches: Iterable[Any],
    scheme: str,
    method: str,
    budget: Budget | None,
    options: object,
    progress: Progress,
) -> Calibration:
    """What ``fxquant.calibrate`` returns; memory does not grow with the number of batches."""
    if method not in METHODS:
        raise CalibrationError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    study = Study(model, override_options(options, scheme=scheme, calibration=None))
    plan = None
    if budget is not None:
        batches, kept = _first(batches, PROBED + CHECKED)
        if kept:
            study(kept[0])
        plan = keep_budget(study, kept, budget, on_probe=lambda done, total: progress("probing sites", done, total))
    count, observers = _observe(study, batches, progress)
    if plan is not None:
        sites = {name: _budgeted(study.sites[name], chosen) for name, chosen in plan.schemes.items()}
    else:
        found = {name: _site(study.sites[name], observer) for name, observer in observers.items()}
        sites = {name: site for name, site in found.items() if site is not None}
    if not sites:
        raise CalibrationError("no linear that could be quantized ran on these batches")
    return Calibration(method, count, sites, plan, reparameterize=study.config.folds)


def _observe(study: Study, batches: Iterable[Any], progress: Progress) -> tuple[int, dict[str, MinMaxObserver]]:
    """Run every batch once, in float; how many there were, and what was seen of each site that has a scheme."""
    observers: dict[str, MinMaxObserver] = {}

    def watch(name: str, x: Tensor) -> None:
        if study.sites[name].scheme is not None:
            observers.setdefault(name, MinMaxObserver(name)).observe(x)

    study.watch = watch
    count = 0
    total = len(batches) if isinstance(batches, Sized) else None
    for batch in batches:
        study(batch)
        count += 1
        progress("observing batches", count, total)
    study.watch = None
    if count == 0:
        raise CalibrationError("there is no batch to calibrate on")
    return count, observers


def _first(batches: Iterable[Any], most: int) -> tuple[Iterable[Any], list[Any]]:
    """All batches again, and the first of them as a list."""
    if isinstance(batches, (list, tuple)):
        return batches, list(batches[:most])
    stream = iter(batches)
    kept = [batch for _, batch in zip(range(most), stream, strict=False)]

    def again() -> Iterator[Any]:
        yield from kept
        yield from stream

    return again(), kept


def _budgeted(site: LinearSite, scheme: str) -> SiteCalibration:
    """A site of a budget's plan; its activations stay dynamic, so that no unseen data can leave their range."""
    return SiteCalibration(scheme, site.shape, is_explicit=True, note="dynamic: chosen by a budget, which fixes no ranges")


def _site(site: LinearSite, observer: MinMaxObserver) -> SiteCalibration | None:
    """The qparams of a site; None where it saw no data or has no activations to code."""
    seen, scheme = observer.statistics(), site.scheme
    if seen is None or not isinstance(scheme, Scheme) or scheme.is_weight_only:
        return None
    qparams = choose_qparams(seen, site.weight.to(torch.float32), scheme.weight_bits, scheme.act_bits)
    return SiteCalibration(str(scheme), site.shape, qparams, is_explicit=site.is_explicit)
