"""fxquant.calibrate: data through the recognised float graph, observers at the inputs of linears."""

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fxquant.budget import Budget
from fxquant.calibration.budgeting import CHECKED, PROBED, keep_budget
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.checkpoint import Checkpoint
from fxquant.calibration.recipes import Gathered, Recipe, find_recipe
from fxquant.calibration.recipes.attention import attention_bits, choose_attention
from fxquant.calibration.site import SiteCalibration
from fxquant.calibration.study import LinearSite, Study
from fxquant.calibration.watching import Watching
from fxquant.config import override_options
from fxquant.errors import CalibrationError

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
    """What ``fxquant.calibrate`` returns; memory does not grow with the number of batches."""
    recipe = find_recipe(method)
    config = override_options(options, scheme=scheme, calibration=None)
    identity = {"method": method, "options": config.model_dump_json(), "seed": str(seed)}
    kept_in = None if checkpoint is None else Checkpoint(checkpoint, identity)
    study = Study(model, config)
    plan = None
    if budget is not None:
        batches, kept = _first(batches, PROBED + CHECKED)
        plan = keep_budget(study, kept, budget, on_probe=lambda done, total: progress("probing sites", done, total))
    # A budget's plan reads no statistics: its data are only counted, and checked to be finite.
    observed = recipe if plan is None else replace(recipe, observes=())
    bits = attention_bits(recipe, config) if plan is None else None
    watching = Watching(study, observed, seed, bits is not None, {})
    count = _observe(watching, batches, kept_in, progress)
    attention = {}
    if plan is not None:
        sites = {name: _budgeted(study.sites[name], chosen) for name, chosen in plan.schemes.items()}
    else:
        sites = _code(watching.gathered, recipe, progress)
    if bits is not None:
        attention = {path: choose_attention(each.seen(), method, bits) for path, each in watching.samplers.items()}
    if kept_in is not None:
        kept_in.remove()
    if not sites and not attention:
        raise CalibrationError("no linear that could be quantized ran on these batches")
    return Calibration(method, count, sites, plan, study.config.folds, attention=attention)


def _observe(watching: Watching, batches: Iterable[Any], checkpoint: Checkpoint | None, progress: Progress) -> int:
    """Run every batch once, in float, for what watches; how many there were."""
    study = watching.study
    seen, watching.restored = checkpoint.load() if checkpoint is not None else (0, {})
    watching.start()
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
                checkpoint.save(count, watching.states())
    except BaseException:  # Ctrl-C too: what was seen is kept
        if checkpoint is not None and not watching.is_empty and is_whole:
            checkpoint.save(count, watching.states())
        raise
    if count == 0:
        raise CalibrationError("there is no batch to calibrate on")
    if watching.is_empty:  # all was seen before a stop: one more run tells the sites, and nothing is observed
        watching.is_observing = False
        study(last)
    watching.stop()
    return count


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
