"""fxquant.calibrate: data through the recognised float graph, observers at the inputs of linears."""

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from fxquant.budget import Budget
from fxquant.calibration.budgeting import CHECKED, PROBED, keep_budget
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.checkpoint import Checkpoint
from fxquant.calibration.observer import MinMaxObserver
from fxquant.calibration.recipes import Gathered, Recipe, find_recipe
from fxquant.calibration.recipes.base import OBSERVERS
from fxquant.calibration.reconstruction.kept import Kept
from fxquant.calibration.reconstruction.sequence import reconstruct
from fxquant.calibration.site import SiteCalibration
from fxquant.calibration.study import LinearSite, Study
from fxquant.config import override_options
from fxquant.errors import CalibrationError
from fxquant.schemes import Scheme

Progress = Callable[[str, int, int | None], None]  # (what, how many are done, of how many)


def run(
    model: Callable[..., Any],
    batches: Iterable[Any],
    scheme: str,
    method: str,
    budget: Budget | None,
    options: object,
    seed: int,
    checkpoint: Path | None,
    progress: Progress,
) -> Calibration:
    """What ``fxquant.calibrate`` returns; memory does not grow with the number of batches, unless the recipe ``follows``."""
    recipe = find_recipe(method)
    config = override_options(options, scheme=scheme, calibration=None)
    identity = {"method": method, "options": config.model_dump_json(), "seed": str(seed)}
    kept_in = None if checkpoint is None else Checkpoint(checkpoint, identity)
    study = Study(model, config)
    plan = None
    if budget is not None:
        batches, few = _first(batches, PROBED + CHECKED)
        plan = keep_budget(study, few, budget, on_probe=lambda done, total: progress("probing sites", done, total))
    follows = recipe.follows if plan is None else None
    if follows is not None:
        batches = list(batches)
    # A budget's plan reads no statistics: its data are only counted, and checked to be finite.
    observed = recipe if plan is None else replace(recipe, observes=())
    count, gathered = _observe(study, batches, observed, seed, kept_in, progress)
    if plan is not None:
        sites = {name: _budgeted(study.sites[name], chosen) for name, chosen in plan.schemes.items()}
    else:
        sites = _code(gathered, recipe, progress)
        if follows is not None and sites:
            kept = Kept.of(kept_in, count, {name: each.states() for name, each in gathered.items()})
            sites = reconstruct(study, list(batches), gathered, sites, follows, method, seed, progress, kept)
    if kept_in is not None:
        kept_in.remove()
    if not sites:
        raise CalibrationError("no linear that could be quantized ran on these batches")
    return Calibration(method, count, sites, plan, reparameterize=study.config.folds)


def _observe(
    study: Study, batches: Iterable[Any], recipe: Recipe, seed: int, checkpoint: Checkpoint | None, progress: Progress
) -> tuple[int, dict[str, Gathered]]:
    """Run every batch once, in float; how many there were, and what was seen of each site that has an integer scheme."""
    gathered: dict[str, Gathered] = {}
    seen, states = checkpoint.load() if checkpoint is not None else (0, {})

    def watch(name: str, x: Tensor) -> None:
        if not isinstance(study.sites[name].scheme, Scheme) or not x.numel():
            return
        if name not in gathered:
            more = {key: OBSERVERS[key](name, seed) for key in recipe.observes}
            gathered[name] = Gathered(study.sites[name], MinMaxObserver(name), more)
            if name in states:
                gathered[name].restore(states[name])
        if count >= seen:
            gathered[name].observe(x)

    study.watch = watch
    count, last, is_whole = 0, None, True  # whether no batch is half seen
    total = len(batches) if isinstance(batches, Sized) else None
    try:
        for batch in batches:
            last = batch
            is_whole = False
            if count >= seen:
                study(batch)
            count += 1
            is_whole = True
            progress("observing batches", count, total)
            if checkpoint is not None and checkpoint.is_due():
                checkpoint.save(count, {name: each.states() for name, each in gathered.items()})
    except BaseException:  # Ctrl-C too: what was seen is kept
        if checkpoint is not None and gathered and is_whole:
            checkpoint.save(count, {name: each.states() for name, each in gathered.items()})
        raise
    if count == 0:
        raise CalibrationError("there is no batch to calibrate on")
    if not gathered:  # all was seen before a stop: one more run tells the sites, and nothing is observed
        count, seen = count - 1, count
        study(last)
        count += 1
    study.watch = None
    return count, gathered


def _code(gathered: Mapping[str, Gathered], recipe: Recipe, progress: Progress) -> dict[str, SiteCalibration]:
    """How the recipe codes every site; sites that it leaves alone are not in it."""
    sites = {}
    for done, (name, seen) in enumerate(gathered.items(), 1):
        known = recipe.code(seen)
        if known is not None:
            sites[name] = known
        progress("coding sites", done, len(gathered))
    return sites


def _first(batches: Iterable[Any], most: int) -> tuple[Iterable[Any], list[Any]]:
    """All batches again, and the first of them as a list."""
    if isinstance(batches, (list, tuple)):
        return batches, list(batches[:most])
    stream = iter(batches)
    kept = list(islice(stream, most))
    return chain(kept, stream), kept


def _budgeted(site: LinearSite, scheme: str) -> SiteCalibration:
    """A site of a budget's plan; its activations stay dynamic, so that no unseen data can leave their range."""
    return SiteCalibration(scheme, site.shape, is_explicit=True, note="dynamic: chosen by a budget, which fixes no ranges")
