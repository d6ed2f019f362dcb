"""The second phase of a calibration: weights rounded in the order of the graph, behind those that were rounded before.

The float model and the coded one walk through the graph side by side, all batches at once, from one stage (the linears that
read one value) to the next. At each the rounding method sees the input as the coded model has it and what the output misses;
where the recipe learns, a whole block is then learned against what the float block hands on. Clips of inputs that were coded by
channels are learned before the block's weights are rounded, since the rounding must see the rescaled columns.

Memory: the batches, and for each of them the values that are alive at one place of the graph, twice (a third and fourth time
where blocks are learned). For a decoder that is a few times tokens · width · 4 bytes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fxquant.calibration.reconstruction.block import Block, Learning, held_out, learn_block
from fxquant.calibration.reconstruction.coded import CodedLinear, as_overrides
from fxquant.calibration.reconstruction.dual_clip import Clipping, clip_block
from fxquant.calibration.reconstruction.kept import Kept
from fxquant.calibration.reconstruction.order import Stage, blocks, stages
from fxquant.calibration.reconstruction.sos import Stages, tune_block
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
    each stage with ``by_stage``, then ``tuning`` of the scales of all. ``clipping`` stands before a block's rounding.
    ``Stages`` tune weights, for which ``rounding`` only chooses scales, without statistics.
    """

    rounding: "Rounding"
    learning: Learning | Stages | None = None
    by_stage: bool = False
    tuning: Tuning | None = None
    clipping: Clipping | None = None

    @property
    def needs_blocks(self) -> bool:
        """Whether something is learned against what a block hands on."""
        return self.learning is not None or self.clipping is not None

    def divide(self, floats: list[Walk]) -> tuple[list[Walk], list[Walk]]:
        """(what is rounded by, what scales are tuned on): codes fit the batches that they were made of, so that those would say
        little of others. With ``tuning`` every second batch is for that alone."""
        return (floats[::2], floats[1::2]) if self.tuning is not None and len(floats) > 1 else (floats, floats)

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
    floats = walks(study, batches, method)
    rounded, tuned = how.divide(floats)
    begun = [walk.fork() for walk in tuned]
    linears = {name: CodedLinear(gathered[name].site, each) for name, each in known.items()}
    run = _Run(study, how, seed, progress, linears, [(walk, walk.fork()) for walk in rounded])
    units = how.units(_ordered(floats, known))
    for i, unit in enumerate(units):
        names = [name for stage in unit for name in stage]
        if all(name in kept.sites for name in names):
            run.take({name: kept.restored(linears[name]) for name in names})
            linears |= {name: CodedLinear(gathered[name].site, run.done[name]) for name in names}
            continue
        following = units[i + 1][0][0] if i + 1 < len(units) else None
        with kept.saved_if_stopped(run.done):
            run.take(run.code(unit, following))
        kept.save_if_due(run.done)
    if how.tuning is None:
        return run.done
    whole = Whole(begun, linears, run.done)
    with kept.saved_if_stopped(run.done):
        return tune(whole, how.tuning, seed, lambda step, steps: progress("tuning scales", step, steps))


@dataclass
class _Run:
    """Walks in float and behind the linears that are ``done``; ``linears`` as their activations are coded so far."""

    study: Study
    how: Reconstruction
    seed: int
    progress: Progress
    linears: dict[str, CodedLinear]
    pairs: list[tuple[Walk, Walk]]
    done: Sites = field(default_factory=dict)

    def take(self, found: Sites) -> None:
        """These sites are done."""
        self.done |= found
        self.progress("rounding sites", len(self.done), len(self.linears))

    def code(self, unit: list[Stage], following: str | None) -> Sites:
        """The sites of a unit; ``following`` is the first site behind it."""
        how, names = self.how, [name for stage in unit for name in stage]
        here = self._reach(unit[0], {})
        before = _forked(here) if how.needs_blocks else []
        block = Block(before, lambda walk: walk.places[following] if following else len(walk.nodes), self.linears, {})
        if how.clipping is not None:
            self.linears |= clip_block(block, unit, how.clipping, self.seed, self._report(f"clipping {unit[0][0]}"))
        report = self._report(f"learning {unit[0][0]}")
        if isinstance(how.learning, Stages):
            known = {name: self.linears[name].known for name in names}
            return tune_block(replace(block, found=known), how.rounding, how.learning, self.seed, report)
        if how.learning is None:
            return self._round(unit, every=True)
        begun = _forked(self.pairs)
        found = replace(block, found=self._round(unit, every=False))
        learned = learn_block(found, how.learning, self.seed, report)
        self.pairs = begun  # they went on with codes that are not those that stay
        return learned or self._round(unit, every=True)

    def _round(self, unit: list[Stage], every: bool) -> Sites:
        """By the statistics of every batch, or of those alone that blocks are learned from: on the others they are measured."""
        found: Sites = {}
        for stage in unit:
            linears, here = [self.linears[name] for name in stage], self._reach(stage, found)
            read = here if every else [here[which] for which in held_out(len(here))[0]]
            for name, linear, seen in zip(stage, linears, see_stage(stage, linears, read), strict=True):
                scheme = linear.scheme
                found[name] = linear.rounded(*self.how.rounding(linear.weight, scheme.weight_bits, scheme.group, seen))
                self.progress("rounding sites", len(self.done) + len(found), len(self.linears))
        return found

    def _reach(self, stage: Stage, found: Sites) -> list[tuple[Walk, Walk]]:
        """The walks that have the stage, advanced to it; those of the coded model by ``found`` too."""
        here = [pair for pair in self.pairs if stage[0] in pair[0].places]
        overrides = as_overrides(self.linears, self.done | found)
        advance_all(self.study, [walk for walk, _ in here], lambda walk: walk.places[stage[0]], {})
        advance_all(self.study, [walk for _, walk in here], lambda walk: walk.places[stage[0]], overrides)
        return here

    def _report(self, what: str) -> Callable[[int, int], None]:
        return lambda step, steps: self.progress(what, step, steps)


def _forked(pairs: Sequence[tuple[Walk, Walk]]) -> list[tuple[Walk, Walk]]:
    return [(float_walk.fork(), coded_walk.fork()) for float_walk, coded_walk in pairs]


def _ordered(floats: Sequence[Walk], known: Mapping[str, SiteCalibration]) -> list[Stage]:
    """The stages of the longest graph: it must have every site that any other has."""
    longest = max(floats, key=lambda walk: len(known.keys() & walk.places.keys()))
    found = stages(longest.graph, known)
    missing = known.keys() - {name for stage in found for name in stage}
    if missing:
        raise CalibrationError(f"no batch reaches every linear ({min(missing)} is only in some graphs); leave such batches out")
    return found
