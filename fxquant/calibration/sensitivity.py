"""What the linears of a model cost its outputs when they alone are quantized, and what they would save.

A unit is what reads one value: a query, key and value projection, or a gate and its partner. Its linears get one scheme, so
that one coding of the value serves them all. For small errors the noises of units add up, so probes of single units are
enough to choose from; the choice is then measured as a whole.

Two schemes of a unit are probed, ``FINE`` and ``COARSE``: the float model runs with this unit as its specification. All
others follow from the noise that each scheme leaves at the unit's own outputs, on the data: the error of the model is a power
of that noise between the two probes. This is what makes the score aware of outliers: a few large values of an input, or of
a weight, leave more noise at as many bits, and the noise tells whether the activations or the weights need them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxquant.calibration.observers import refuse_not_finite
from fxquant.calibration.reconstruction.coded import CodedLinear, computed
from fxquant.calibration.site import SiteCalibration
from fxquant.calibration.study import Linear, LinearSite, Prefix, Study
from fxquant.lowering.isa import current_isa
from fxquant.lowering.timings import linear_timing
from fxquant.schemes import LinearScheme, Scheme

FINE, COARSE = Scheme(8, 8), Scheme(6, 6)  # that every unit is probed in
# Where no table was measured a multiply-accumulate costs this many picoseconds by bits of weight and activation, from the
# peaks of AVX2 with two threads (cpu-kernels: 226 GFMA/s float, 738 and 364 GOP/s of 8- and 16-bit products).
FLOAT_PS, WIDE_PS, NARROW_PS = 5.9, 3.4, 2.0
VNNI = ("avx_vnni", "avx512_vnni")  # where every width of the panel kernels takes the same time
# Schemes of as many bits in all run the same instructions on AVX2: the one that the table has stands for them.
AS_FAST_AS = {16: ("w8a8",), 15: ("w8a7",), 14: ("w7a7",), 13: ("w7a7", "w6a6"), 12: ("w6a6",)}
SLOPES = (0.25, 2.0)  # of the model's error against the noise at a unit's output, in logarithms: 1 for small errors


@dataclass(frozen=True)
class Probe:
    """One unit in one scheme (``float``: as it is): the error that it alone causes, and its microseconds a call."""

    sites: tuple[str, ...]
    scheme: str
    error: float
    us: float


def units(study: Study) -> list[list[LinearSite]]:
    """The linears that read one value, in the order of the graph; those whose scheme was asked for by name are left out."""
    found: dict[str, list[LinearSite]] = {}
    for name, site in study.sites.items():
        if not site.is_explicit:
            found.setdefault(site.reads or name, []).append(site)
    return list(found.values())


def measure(
    study: Study,
    batches: Sequence[Any],
    schemes: Sequence[LinearScheme],
    error: Callable[[Any, Any], float],
    on_probe: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Probe]]:
    """The probes of every unit that ran, float among them; ``on_probe`` hears how many are done.

    The study is left as it was found.
    """
    before, runs = study.overrides, study.runs
    wanted = [study(batch) for batch in batches]
    is_one_graph = study.runs - runs == len(batches)
    noises = local_noises(study, batches, (*schemes, FINE, COARSE))
    prefixes = [Prefix() for _ in batches]
    every = units(study)

    def probed(unit: Sequence[LinearSite], scheme: LinearScheme) -> float:
        study.overrides = {**before, **{site.name: specification(site, scheme) for site in unit}}
        cost = 0.0
        for y, batch, prefix in zip(wanted, batches, prefixes, strict=True):
            cost += error(y, study.resume(batch, unit[0].name, prefix) if is_one_graph else study(batch))
        return cost / len(batches)

    found = []
    for done, unit in enumerate(every, 1):
        noise = noises[unit[0].name]
        found.append([_probe(unit, None, 0.0)])
        if noise:
            anchors = [(noise[str(scheme)], probed(unit, scheme)) for scheme in (FINE, COARSE)]
            found[-1] += [_probe(unit, scheme, predicted(noise[str(scheme)], *anchors)) for scheme in schemes]
        on_probe(done, len(every))
    study.overrides = before
    return found


def local_noises(study: Study, batches: Sequence[Any], schemes: Sequence[LinearScheme]) -> dict[str, dict[str, float]]:
    """First site of a unit → scheme → noise over signal at the unit's outputs, summed over its linears.

    Empty for a unit that no row reaches.
    """
    first = {site.name: unit[0].name for unit in units(study) for site in unit}
    ways = {name: {str(scheme): specification(study.sites[name], scheme) for scheme in schemes} for name in first}
    found: dict[str, dict[str, float]] = {name: {} for name in first.values()}

    def watch(name: str, x: Tensor) -> None:
        if name not in first or not x.numel():
            return
        weight = study.sites[name].weight
        y = torch.nn.functional.linear(x, weight)
        signal = max(float(y.to(torch.float64).square().sum()), 1e-30)
        for scheme, way in ways[name].items():
            noise = float((way(x, weight, None) - y).to(torch.float64).square().sum())
            sums = found[first[name]]
            sums[scheme] = sums.get(scheme, 0.0) + noise / signal / len(batches)

    study.watch = watch
    for batch in batches:
        study(batch)
    study.watch = None
    return found


def predicted(noise: float, fine: tuple[float, float], coarse: tuple[float, float]) -> float:
    """The model's error at a noise, from the (noise, error) of the two probes: a power of it through both."""
    if noise <= 0:
        return 0.0
    if min(*fine, *coarse) <= 0 or math.isclose(fine[0], coarse[0]):
        return max(coarse[1], 0.0) * noise / coarse[0] if coarse[0] > 0 else 0.0
    slope = math.log(coarse[1] / fine[1]) / math.log(coarse[0] / fine[0])
    slope = min(max(slope, SLOPES[0]), SLOPES[1])
    near = fine if abs(math.log(noise / fine[0])) < abs(math.log(noise / coarse[0])) else coarse
    return float(near[1] * (noise / near[0]) ** slope)


def references(study: Study, batches: Sequence[Any]) -> list[Any]:
    """The float outputs.

    Raises:
        CalibrationError: an input or a weight of a linear is not finite.
    """

    def watch(name: str, x: Tensor) -> None:
        refuse_not_finite(name, x)
        study.sites[name].refuse_not_finite()

    study.watch = watch
    try:
        return [study(batch) for batch in batches]
    finally:
        study.watch = None


def specification(site: LinearSite, scheme: LinearScheme, known: SiteCalibration | None = None) -> Linear:
    """What a linear computes in a scheme: with dynamic activations and its weight to the nearest, or as ``known`` has it.

    Raises:
        PackError: its weight cannot be rounded.
    """
    coded = coded_linear(site, scheme, known)
    value = coded.value
    return computed(coded, lambda: value)


def coded_linear(site: LinearSite, scheme: LinearScheme, known: SiteCalibration | None = None) -> CodedLinear:
    """A site in a scheme."""
    return CodedLinear(replace(site, scheme=scheme), known or SiteCalibration(str(scheme), site.shape))


def cost_us(site: LinearSite, scheme: LinearScheme | None) -> float:
    """Microseconds of a linear: by the measured table of the instruction set, else by the peaks of its arithmetic."""
    (n, k), rows = site.shape, site.rows or 1
    if scheme is None:
        timing = linear_timing(current_isa(), None, rows, k, n)
        if timing is not None:
            return min(timing.float_us, timing.own_float_us or timing.float_us)
    else:
        known = AS_FAST_AS.get(_bits(scheme), ())
        timings = [linear_timing(current_isa(), name, rows, k, n) for name in known]
        us = [timing.scheme_us for timing in timings if timing is not None and timing.scheme_us is not None]
        if us and len(us) == len(known):
            return math.prod(us) ** (1 / len(us))
    return rows * n * k * _picoseconds(scheme) * 1e-6


def _probe(unit: Sequence[LinearSite], scheme: LinearScheme | None, error: float) -> Probe:
    names = tuple(site.name for site in unit)
    return Probe(names, "float" if scheme is None else str(scheme), error, sum(cost_us(site, scheme) for site in unit))


def _bits(scheme: LinearScheme) -> int:
    """Of weight and activation together; 0 where the activations stay float."""
    is_integer = isinstance(scheme, Scheme) and not scheme.is_weight_only
    return scheme.weight_bits + scheme.act_bits if is_integer and isinstance(scheme, Scheme) else 0


def _picoseconds(scheme: LinearScheme | None) -> float:
    bits = 0 if scheme is None else _bits(scheme)
    if not bits:
        return FLOAT_PS
    if current_isa() in VNNI:
        return NARROW_PS
    return WIDE_PS if bits > 15 else NARROW_PS * (1 + 0.05 * (bits - 12))
