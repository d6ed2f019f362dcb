"""A recipe: a published way to code the linears of a model, as data. What it observes, and how a site follows from that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxquant.calibration.files import Vectors
from fxquant.calibration.observers import (
    BalancedGram,
    EmaExtent,
    Gram,
    Histogram,
    InputExtents,
    Moments,
    Observer,
    QuantileSketch,
    Reservoir,
)
from fxquant.calibration.qparams import StaticQParams, choose_qparams
from fxquant.calibration.seen import Seen
from fxquant.calibration.site import INACCURATE, Migration, SiteCalibration, StaticCoding, WeightCodes, weight_digest
from fxquant.calibration.study import LinearSite
from fxquant.granularity import PerChannel
from fxquant.schemes import Scheme

if TYPE_CHECKING:
    from fxquant.calibration.reconstruction.sequence import Reconstruction

SAMPLED_ROWS = 256  # of each input: enough for a search over a handful of candidates
MANY_ROWS = 2048  # enough for quantiles of every channel
Rounding = Callable[[Tensor, int, int, Seen], tuple[Tensor, Tensor]]  # (weight, bits, group, seen) → (codes, scale)
OBSERVERS: Mapping[str, Callable[[str, int], Observer]] = {
    "balanced": lambda site, seed: BalancedGram(site),
    "ema": lambda site, seed: EmaExtent(site),
    "gram": lambda site, seed: Gram(site),
    "histogram": lambda site, seed: Histogram(site),
    "moments": lambda site, seed: Moments(site, PerChannel(-1)),
    "quantiles": lambda site, seed: QuantileSketch(site),
    "rows": lambda site, seed: Reservoir(site, SAMPLED_ROWS, seed),
    "many rows": lambda site, seed: Reservoir(site, MANY_ROWS, seed),
}


@dataclass(frozen=True)
class Gathered:
    """What was seen of one linear's input: the extent of its channels, and what the recipe's observers hold."""

    site: LinearSite
    extents: InputExtents
    observers: Mapping[str, Observer]

    def observe(self, x: Tensor) -> None:
        """Take one input of the linear into account."""
        self.extents.observe(x)
        for observer in self.observers.values():
            observer.observe(x)

    def with_scheme(self, scheme: Scheme) -> "Gathered":
        """The same site with another scheme, by name."""
        return replace(self, site=replace(self.site, scheme=scheme, is_explicit=True))

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The state of every observer, by name."""
        return {"extents": self.extents.state(), **{name: each.state() for name, each in self.observers.items()}}

    def restore(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from states."""
        self.extents.restore(states.get("extents", {}))
        for name, each in self.observers.items():
            each.restore(states[name])

    @property
    def scheme(self) -> Scheme:
        """The integer scheme of the site; recipes of linears know no other."""
        assert isinstance(self.site.scheme, Scheme)
        return self.site.scheme

    @cached_property
    def weight(self) -> Tensor:
        """float32 [N, K]."""
        return self.site.weight.detach().to(torch.float32)

    @cached_property
    def rows(self) -> Tensor:
        """Some rows of the input, float32 [R, K]."""
        return self.seen.need("rows", "the method").to(torch.float32)

    @cached_property
    def seen(self) -> Seen:
        """The statistics that rounding methods and migrations read, as far as they were observed."""
        gram, moments, balanced = (self.observers.get(name) for name in ("gram", "moments", "balanced"))
        rows = self.observers.get("many rows", self.observers.get("rows"))
        found: dict[str, Any] = {}
        tokens = 0
        if isinstance(balanced, BalancedGram):
            tokens = balanced.rows
            found["hessian"], found["mean"] = 2 * balanced.gram, balanced.mean.to(torch.float64)
        if isinstance(gram, Gram):
            tokens = gram.rows
            found["hessian"] = gram.gram.to(torch.float64) * (2 / tokens)
        if isinstance(moments, Moments):
            tokens = int(moments.count.reshape(-1)[0])
            found["absmax"] = moments.absmax.reshape(-1).to(torch.float32)
            found["mean"] = moments.mean.reshape(-1).to(torch.float64)
            found["mean_abs"] = moments.magnitude.reshape(-1).to(torch.float32)
            found["mean_square"] = moments.mean_square.reshape(-1).to(torch.float32)
        if isinstance(rows, Reservoir):
            found["rows"] = rows.items
            tokens = tokens or rows.seen
        return Seen(tokens, **found)

    def min_max(self) -> StaticQParams | None:
        """Min-max qparams of the input; None where activations stay float, or nothing was seen."""
        seen = self.extents.statistics()
        if seen is None or self.scheme.is_weight_only:
            return None
        return choose_qparams(seen, self.weight, self.scheme.weight_bits, self.scheme.act_bits)

    def calibrated(
        self,
        static: StaticQParams | StaticCoding | None = None,
        factor: Tensor | None = None,
        rounding: Rounding | None = None,
        note: str | None = None,
        shift: Tensor | None = None,
    ) -> SiteCalibration:
        """The site with these qparams or this factor, after a shift, its weight rounded as the kernel will multiply it."""
        codes = None
        if rounding is not None:
            by = static.steps if isinstance(static, StaticQParams) else factor
            weight = self.weight if by is None else self.weight * by
            seen = self.seen if shift is None else self.seen.shifted(shift)
            seen = seen if by is None else seen.divided(by)
            codes = self._codes(*rounding(weight, self.scheme.weight_bits, self.scheme.group, seen))
        moved = [None if each is None else each.to(torch.float32) for each in (factor, shift)]
        migration = None if factor is None and shift is None else Migration(*moved)
        name, explicit = str(self.site.scheme), self.site.is_explicit
        return SiteCalibration(name, self.site.shape, static, migration, codes, note, explicit)

    def _codes(self, codes: Tensor, scale: Tensor) -> WeightCodes:
        return WeightCodes(codes, scale, weight_digest(self.site.weight), self.scheme.group)


@dataclass(frozen=True)
class Recipe:
    """One published method: ``observes`` are keys of ``OBSERVERS`` besides the extents, ``code`` gives a site its coding.

    None: the site stays as an option without calibration would have it. ``codes_attention``: ``recipes.attention`` has its
    codings of attention, which are part of the method. ``schemes`` may give sites another scheme than the one that was asked
    for, from what was seen of all of them. With ``follows`` the weights are not rounded by ``code`` but after it, in the order
    of the graph, behind the sites that were rounded before; the batches are kept for it. Before anything is observed, ``folds``
    run, and the migrations that ``vectors`` has vectors for, made of the graph after the folds and of the seed.
    """

    name: str
    source: str
    code: Callable[[Gathered], SiteCalibration | None]
    observes: tuple[str, ...] = ()
    codes_attention: bool = False
    schemes: Callable[[Mapping[str, Gathered]], Mapping[str, Scheme]] | None = None
    follows: "Reconstruction | None" = None
    folds: tuple[str, ...] = ()
    vectors: Callable[..., Vectors] | None = None


def static_or_dynamic(gathered: Gathered, rounding: Rounding | None = None) -> SiteCalibration | None:
    """Min-max static qparams where they are about as accurate as dynamic ones, else dynamic; the weight by ``rounding``."""
    static = gathered.min_max()
    if static is None:
        return gathered.calibrated(rounding=rounding) if rounding is not None and gathered.scheme.is_weight_only else None
    known = gathered.calibrated(static)
    if rounding is None:
        return known
    return (
        gathered.calibrated(static, rounding=rounding)
        if known.is_accurate
        else gathered.calibrated(rounding=rounding, note=INACCURATE)
    )
