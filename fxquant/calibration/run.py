"""fxquant.calibrate: data through the recognised float graph, observers at the inputs of linears."""

from collections.abc import Callable, Iterable, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any

from torch import fx

from fxquant.budget import Budget
from fxquant.calibration.attention import AttentionCalibration
from fxquant.calibration.budgeting import CHECKED, PROBED, keep_budget
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.checkpoint import Checkpoint
from fxquant.calibration.files import Vectors, flat
from fxquant.calibration.recipes import Gathered, Recipe, find_recipe
from fxquant.calibration.recipes.attention import attention_bits, choose_attention
from fxquant.calibration.reconstruction.kept import Kept
from fxquant.calibration.reconstruction.sequence import reconstruct
from fxquant.calibration.site import SiteCalibration, weight_digest
from fxquant.calibration.study import NAMED, LinearSite, Study, refuse_no_batches
from fxquant.calibration.watching import Watching
from fxquant.config import override_options
from fxquant.errors import CalibrationError, ConfigError
from fxquant.passes.reparam import rotation
from fxquant.passes.reparam.stream import NO_STREAM
from fxquant.passes.rule import Refused

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
    vectors: Vectors | None = None,
) -> Calibration:
    """What ``fxquant.calibrate`` returns; memory does not grow with the number of batches, unless the recipe ``follows``."""
    recipe = find_recipe(method)
    refuse_no_batches(batches)
    config = override_options(options, scheme=scheme, calibration=None)
    if budget is not None:
        _refuse_with_budget(scheme, method, checkpoint)
        return _run_budget(Study(model, config, _prepare(vectors, None, seed)), batches, budget, progress)
    given = {place: weight_digest(vector) for place, vector in sorted(flat(vectors or {}).items())}
    identity = {"method": method, "options": config.model_dump_json(), "seed": str(seed), "vectors": str(given)}
    kept_in = None if checkpoint is None else Checkpoint(checkpoint, identity)
    folds = tuple(dict.fromkeys((*config.folds, *recipe.folds)))
    study = Study(model, config.model_copy(update={"reparameterize": folds}), _prepare(vectors, recipe, seed))
    batches = batches if recipe.follows is None else list(batches)
    bits = attention_bits(recipe, config)
    watching, count = _observe(study, batches, recipe, seed, bits is not None, kept_in, progress)
    sites = _code(watching.gathered, recipe, progress)
    attention = {} if bits is None else _code_attention(watching, method, bits, progress)
    if recipe.follows is not None and sites:
        kept = Kept.of(kept_in, count, watching.states())
        sites = reconstruct(study, batches, watching.gathered, sites, recipe.follows, method, seed, progress, kept)
    if kept_in is not None:
        kept_in.remove()
    if not sites and not attention:
        raise CalibrationError(_nothing(study, watching.gathered, method))
    return Calibration(method, count, sites, reparameterize=folds, vectors=study.vectors, attention=attention)


def _prepare(given: Vectors | None, recipe: Recipe | None, seed: int) -> Callable[[fx.GraphModule], Vectors] | None:
    """The vectors of a graph: those that the user gave, and those of the recipe."""
    own = recipe.vectors if recipe is not None else None
    if not given and own is None:
        return None
    return lambda gm: {**(given or {}), **(own(gm, seed=seed) if own is not None else {})}


def _run_budget(study: Study, batches: Iterable[Any], budget: Budget, progress: Progress) -> Calibration:
    """The plan of a budget as a calibration; no more batches are read than it looks at."""
    kept = list(islice(batches, PROBED + CHECKED))
    plan = keep_budget(study, kept, budget, on_probe=lambda done, total: progress("probing linears", done, total))
    sites = {name: _budgeted(study.sites[name], chosen) for name, chosen in plan.schemes.items()}
    return Calibration("budget", len(kept), sites, plan, reparameterize=study.config.folds, vectors=study.vectors)


def _refuse_unrotated(study: Study, recipe: Recipe) -> None:
    """Refuse a model of which a recipe that rotates streams can rotate none.

    Raises:
        CalibrationError: with the first reason.
    """
    events = [event for event in study.migrations if event.rule is rotation.RULE]
    sentences = [event.sentence for event in events if isinstance(event, Refused)]
    if recipe.vectors is not None and len(sentences) == len(events):
        reason = sentences[0] if sentences else NO_STREAM
        raise CalibrationError(f"{recipe.name} can rotate no stream of this model: {reason}; use the method gptq")


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


def _observe(
    study: Study,
    batches: Iterable[Any],
    recipe: Recipe,
    seed: int,
    attention: bool,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> tuple[Watching, int]:
    """Run every batch once, in float; what was seen of each site, and how many there were.

    Batches that a checkpoint has seen are run again only until every site that it knows has been met.
    """
    seen, states = checkpoint.load() if checkpoint is not None else (0, {})
    watching = Watching(study, recipe, seed, states, holds=checkpoint is not None, attention=attention)
    count, is_whole = 0, True  # whether no batch is half observed
    total = len(batches) if isinstance(batches, Sized) else None
    try:
        for batch in batches:
            watching.is_on = count >= seen
            if watching.is_on or not watching.knows_all:
                _run_batch(study, batch, count + 1)
                _refuse_unrotated(study, recipe)
            is_whole = False
            watching.take()
            count, is_whole = count + 1, True
            progress("observing batches", count, total)
            if checkpoint is not None and checkpoint.is_due():
                checkpoint.save(max(count, seen), watching.states())
    except BaseException:  # Ctrl-C too: what was seen is kept
        if checkpoint is not None and not watching.is_empty and is_whole:
            checkpoint.save(max(count, seen), watching.states())
        raise
    if count == 0:
        raise CalibrationError("there is no batch to calibrate on; a generator that was read before is empty")
    if count < seen:
        raise CalibrationError(f"the checkpoint has seen {seen} batches, and there are {count}; give it the batches of before")
    watching.complete()
    if checkpoint is not None and count > seen and not watching.is_empty:
        checkpoint.save(count, watching.states())  # searches follow, which may be stopped or fail
    return watching, count


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
    chosen = recipe.schemes(gathered) if recipe.schemes is not None else {}
    gathered = {name: seen.with_scheme(chosen[name]) if name in chosen else seen for name, seen in gathered.items()}
    for done, (name, seen) in enumerate(gathered.items(), 1):
        known = recipe.code(seen)
        if known is not None:
            sites[name] = known
        progress("coding sites", done, len(gathered))
    return sites


def _code_attention(watching: Watching, method: str, bits: int, progress: Progress) -> dict[str, AttentionCalibration]:
    """How the method codes every attention, by path."""
    found = {}
    for done, (path, sampler) in enumerate(watching.samplers.items(), 1):
        found[path] = choose_attention(sampler.seen(), method, bits)
        progress("coding attention", done, len(watching.samplers))
    return found


def _nothing(study: Study, gathered: Mapping[str, Gathered], method: str) -> str:
    """Why no site was coded."""
    for name, seen in gathered.items():
        return (
            f"{name}: method {method!r} has nothing to fix where {seen.scheme} leaves activations float; "
            "take one that rounds weights, such as gptq, or leave the calibration out"
        )
    if not study.sites:
        return study.nothing
    for name, site in study.sites.items():
        if site.scheme is not None:
            return f"{name}: the codes of {site.scheme} follow from what is coded, with no calibration; leave it out"
    return f"no linear is to be quantized: the options leave {', '.join([*study.sites][:NAMED])} float"


def _budgeted(site: LinearSite, scheme: str) -> SiteCalibration:
    """A site of a budget's plan; its activations stay dynamic, so that no unseen data can leave their range."""
    return SiteCalibration(scheme, site.shape, is_explicit=True, note="dynamic: chosen by a budget, which fixes no ranges")
