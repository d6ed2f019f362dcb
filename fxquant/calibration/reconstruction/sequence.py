"""The second phase of a calibration: weights rounded in the order of the graph, behind those that were rounded before.

The float model and the coded one walk through the graph side by side, all batches at once, from one stage (the linears that
read one value) to the next. At each the rounding method sees the input as the coded model has it and what the output misses;
where the recipe learns, a whole block is then learned against what the float block hands on.

Memory: the batches, and for each of them the values that are alive at one place of the graph, twice (a third and fourth time
where blocks are learned). For a decoder that is a few times tokens · width · 4 bytes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxquant.calibration.reconstruction.block import Block, Learning, learn_block
from fxquant.calibration.reconstruction.coded import CodedLinear, as_overrides
from fxquant.calibration.reconstruction.kept import Kept
from fxquant.calibration.reconstruction.order import Stage, blocks, stages
from fxquant.calibration.reconstruction.statistics import see_stage
from fxquant.calibration.reconstruction.tuning import Tuning, Whole, tune
from fxquant.calibration.reconstruction.walk import Walk, advance_all, walks
from fxquant.calibration.site import SiteCalibration
from fxquant.calibration.study import Study
from fxquant.errors import CalibrationError

if TYPE_CHECKING:
    from fxquant.calibration.recipes.base import Gathered, Rounding

Progress = Callable[[str, int, int | None], None]
Sites = dict[str, SiteCalibration]


@dataclass(frozen=True)
class Reconstruction:
    """How weights are rounded behind the coded prefix: ``rounding`` for each linear, then ``learning`` for each block, or for
    each stage with ``by_stage``, then ``tuning`` of the scales of all."""

    rounding: "Rounding"
    learning: Learning | None = None
    by_stage: bool = False
    tuning: Tuning | None = None

    def units(self, ordered: list[Stage]) -> list[list[Stage]]:
        """What is learned, and kept in a checkpoint, at once."""
        return [[stage] for stage in ordered] if self.by_stage else blocks(ordered)


def reconstruct(
    study: Study,
    batches: Iterable[Any],
    gathered: "Mapping[str, Gathered]",
    known: Mapping[str, SiteCalibration],
    how: Reconstruction,
    method: str,
    seed: int,
    progress: Progress,
    kept: Kept,
) -> Sites:
    """The sites of ``known``, which have their activations coded, with their weights rounded.

    Raises:
        CalibrationError: the model is not one graph, or batches reach its linears in different order.
    """
    linears = {name: CodedLinear(gathered[name], each) for name, each in known.items()}
    floats = walks(study, batches, method)
    begun = [walk.fork() for walk in floats]
    pairs = [(walk, walk.fork()) for walk in floats]
    units = how.units(_ordered(floats, known))
    done: Sites = {}
    total = sum(len(stage) for unit in units for stage in unit)
    for i, unit in enumerate(units):
        names = [name for stage in unit for name in stage]
        if all(name in kept.sites for name in names):
            done |= {name: linears[name].rounded(*kept.sites[name]) for name in names}
            progress("rounding sites", len(done), total)
            continue
        following = units[i + 1][0][0] if i + 1 < len(units) else None
        with kept.saved_if_stopped(done):
            done |= _unit(study, unit, following, linears, pairs, done, how, seed, progress, total)
        kept.save_if_due(done)
    if how.tuning is None:
        return done
    with kept.saved_if_stopped(done):
        return tune(Whole(begun, linears, done), how.tuning, seed, lambda step, steps: progress("tuning scales", step, steps))


def _unit(
    study: Study,
    unit: list[Stage],
    following: str | None,
    linears: Mapping[str, CodedLinear],
    pairs: list[tuple[Walk, Walk]],
    done: Sites,
    how: Reconstruction,
    seed: int,
    progress: Progress,
    total: int,
) -> Sites:
    found: Sites = {}
    here = _reach(study, unit[0], pairs, linears, done)
    before = [(float_walk.fork(), coded_walk.fork()) for float_walk, coded_walk in here] if how.learning is not None else []
    for stage in unit:
        here = _reach(study, stage, pairs, linears, done | found)
        for name, seen in zip(stage, see_stage(stage, [linears[name] for name in stage], here), strict=True):
            scheme = linears[name].gathered.scheme
            codes = how.rounding(linears[name].weight, scheme.weight_bits, scheme.group, seen)
            found[name] = linears[name].rounded(*codes)
            progress("rounding sites", len(done) + len(found), total)
    if how.learning is None:
        return found
    block = Block(before, lambda walk: walk.places[following] if following else len(walk.nodes), linears, found)
    return learn_block(block, how.learning, seed, lambda step, steps: progress(f"learning {unit[0][0]}", step, steps))


def _reach(
    study: Study, stage: Stage, pairs: list[tuple[Walk, Walk]], linears: Mapping[str, CodedLinear], done: Sites
) -> list[tuple[Walk, Walk]]:
    """The walks that have the stage, advanced to it."""
    here = [pair for pair in pairs if stage[0] in pair[0].places]
    advance_all(study, [walk for walk, _ in here], lambda walk: walk.places[stage[0]], {})
    advance_all(study, [walk for _, walk in here], lambda walk: walk.places[stage[0]], as_overrides(linears, done))
    return here


def _ordered(floats: Sequence[Walk], known: Mapping[str, SiteCalibration]) -> list[Stage]:
    """The stages of the longest graph: it must have every site that any other has."""
    longest = max(floats, key=lambda walk: len(known.keys() & walk.places.keys()))
    found = stages(longest.graph, known)
    missing = known.keys() - {name for stage in found for name in stage}
    if missing:
        raise CalibrationError(f"no batch reaches every linear ({min(missing)} is only in some graphs); leave such batches out")
    return found
