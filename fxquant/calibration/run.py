"""fxquant.calibrate: data through the recognised float graph, observers at the inputs of linears."""

from collections.abc import Callable, Iterable, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from fxquant.budget import Budget
from fxquant.calibration.budgeting import CHECKED, PROBED, keep_budget
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.checkpoint import Checkpoint, States
from fxquant.calibration.observers import InputExtents, refuse_not_finite
from fxquant.calibration.recipes import Gathered, Recipe, find_recipe
from fxquant.calibration.recipes.base import OBSERVERS
from fxquant.calibration.site import SiteCalibration
from fxquant.calibration.study import LinearSite, Study, refuse_no_batches
from fxquant.config import override_options
from fxquant.errors import CalibrationError, ConfigError
from fxquant.schemes import Scheme

DEFAULT_METHOD = "minmax"
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
    refuse_no_batches(batches)
    config = override_options(options, scheme=scheme, calibration=None)
    if budget is not None:
        _refuse_with_budget(scheme, method, checkpoint)
        return _run_budget(Study(model, config), batches, budget, progress)
    identity = {"method": method, "options": config.model_dump_json(), "seed": str(seed)}
    kept_in = None if checkpoint is None else Checkpoint(checkpoint, identity)
    study = Study(model, config)
    count, gathered = _observe(study, batches, recipe, seed, kept_in, progress)
    sites = _code(gathered, recipe, progress)
    if kept_in is not None:
        kept_in.remove()
    if not sites:
        raise CalibrationError("no linear that could be quantized ran on these batches")
    return Calibration(method, count, sites, reparameterize=study.config.folds)


def _run_budget(study: Study, batches: Iterable[Any], budget: Budget, progress: Progress) -> Calibration:
    """The plan of a budget as a calibration; no more batches are read than it looks at."""
    kept = list(islice(batches, PROBED + CHECKED))
    plan = keep_budget(study, kept, budget, on_probe=lambda done, total: progress("probing linears", done, total))
    sites = {name: _budgeted(study.sites[name], chosen) for name, chosen in plan.schemes.items()}
    return Calibration("budget", len(kept), sites, plan, reparameterize=study.config.folds)


def _refuse_with_budget(scheme: str, method: str, checkpoint: Path | None) -> None:
    """Refuse what a budget would not heed.

    Raises:
        ConfigError: a scheme, a method or a checkpoint stands beside it.
    """
    if scheme != "auto":
        raise ConfigError(
            f"scheme {scheme!r} and a budget: a budget gives every linear a scheme; leave scheme out, or name single sites "
            f"in options={{'sites': {{...: {scheme!r}}}}}"
        )
    if method != DEFAULT_METHOD:
        raise ConfigError(
            f"method {method!r} and a budget: the plan of a budget rounds weights to the nearest, and its activations are "
            f"dynamic; leave method out, or calibrate again with method={method!r} and "
            "options={'sites': calibration.plan.schemes}"
        )
    if checkpoint is not None:
        raise ConfigError(f"checkpoint {str(checkpoint)!r} and a budget: its search cannot be stopped and go on; leave it out")


class _Collector:
    """Watches a study with the observers of a recipe at every linear that has an integer scheme.

    With ``holds`` the inputs of a batch are kept until ``take``, so that a batch that fails half-way counts as none.
    """

    def __init__(self, study: Study, recipe: Recipe, seed: int, states: States, holds: bool) -> None:
        self._study, self._recipe, self._seed, self._states, self._holds = study, recipe, seed, states, holds
        self._held: list[tuple[str, Tensor]] = []
        self.gathered: dict[str, Gathered] = {}
        self.is_on = True

    def __call__(self, name: str, x: Tensor) -> None:
        if not self.is_on or not isinstance(self._study.sites[name].scheme, Scheme) or not x.numel():
            return
        refuse_not_finite(name, x)
        if self._holds:
            self._held.append((name, x.clone()))
        else:
            self._at(name).observe(x)

    def take(self) -> None:
        """Observe what is held."""
        for name, x in self._held:
            self._at(name).observe(x)
        self._held.clear()

    @property
    def knows_all(self) -> bool:
        """Whether every site of the states that it goes on from has been met."""
        return self._states.keys() <= self._study.sites.keys()

    def complete(self) -> dict[str, Gathered]:
        """Everything that was seen, before a stop and after it."""
        for name in self._states.keys() & self._study.sites.keys():
            self._at(name)
        return self.gathered

    def states(self) -> States:
        """What a checkpoint keeps."""
        return {**self._states, **{name: each.states() for name, each in self.gathered.items()}}

    def _at(self, name: str) -> Gathered:
        if name not in self.gathered:
            more = {key: OBSERVERS[key](name, self._seed) for key in self._recipe.observes}
            self.gathered[name] = Gathered(self._study.sites[name], InputExtents(name), more)
            if name in self._states:
                self.gathered[name].restore(self._states[name])
        return self.gathered[name]


def _observe(
    study: Study, batches: Iterable[Any], recipe: Recipe, seed: int, checkpoint: Checkpoint | None, progress: Progress
) -> tuple[int, dict[str, Gathered]]:
    """Run every batch once, in float; how many there were, and what was seen of each site that has an integer scheme.

    Batches that a checkpoint has seen are run again only until every site that it knows has been met.
    """
    seen, states = checkpoint.load() if checkpoint is not None else (0, {})
    study.watch = collector = _Collector(study, recipe, seed, states, holds=checkpoint is not None)
    count, is_whole = 0, True  # whether no batch is half observed
    total = len(batches) if isinstance(batches, Sized) else None
    try:
        for batch in batches:
            collector.is_on = count >= seen
            if collector.is_on or not collector.knows_all:
                _run_batch(study, batch, count + 1)
            is_whole = False
            collector.take()
            count, is_whole = count + 1, True
            progress("observing batches", count, total)
            if checkpoint is not None and checkpoint.is_due():
                checkpoint.save(max(count, seen), collector.states())
    except BaseException:  # Ctrl-C too: what was seen is kept
        if checkpoint is not None and collector.gathered and is_whole:
            checkpoint.save(max(count, seen), collector.states())
        raise
    study.watch = None
    if count == 0:
        raise CalibrationError("there is no batch to calibrate on; a generator that was read before is empty")
    if count < seen:
        raise CalibrationError(f"the checkpoint has seen {seen} batches, and there are {count}; give it the batches of before")
    return count, collector.complete()


def _run_batch(study: Study, batch: Any, number: int) -> None:
    """One batch in float; what it raises says which one it was."""
    try:
        study(batch)
    except CalibrationError as error:
        raise CalibrationError(f"batch {number}: {error}") from None
    except Exception as error:
        error.add_note(f"fxquant.calibrate: in batch {number} of the calibration data")
        raise


def _code(gathered: Mapping[str, Gathered], recipe: Recipe, progress: Progress) -> dict[str, SiteCalibration]:
    """How the recipe codes every site; sites that it leaves alone are not in it."""
    sites = {}
    for done, (name, seen) in enumerate(gathered.items(), 1):
        known = recipe.code(seen)
        if known is not None:
            sites[name] = known
        progress("coding sites", done, len(gathered))
    return sites


def _budgeted(site: LinearSite, scheme: str) -> SiteCalibration:
    """A site of a budget's plan; its activations stay dynamic, so that no unseen data can leave their range."""
    return SiteCalibration(scheme, site.shape, is_explicit=True, note="dynamic: chosen by a budget, which fixes no ranges")
