"""Bits by cost against error: of one probe a unit, the fastest whose errors add up to at most a limit.

A multiple-choice knapsack. Unit by unit, the front of all sums of error and time is kept: points that no other beats in both.
That is exact up to ``MOST_POINTS`` points, beyond which neighbours on the front are thinned out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fxquant.calibration.sensitivity import Probe

MOST_POINTS = 1500  # of a front: neighbours then differ by less than a probe can tell


@dataclass(frozen=True)
class Allocation:
    """Site → scheme (``float`` among them), with the predicted error of all together and the time of all linears."""

    schemes: Mapping[str, str]
    error: float
    us: float


@dataclass(frozen=True)
class _Point:
    error: float
    us: float
    probe: Probe | None = None
    before: "_Point | None" = None


def allocate(probes: Sequence[Sequence[Probe]], limit: float) -> Allocation:
    """The fastest allocation whose errors add up to at most ``limit``; every unit needs one without error."""
    return within(curve(probes), limit)


def within(front: Sequence[Allocation], limit: float) -> Allocation:
    """The fastest on a curve whose error is at most ``limit``."""
    return [point for point in front if point.error <= limit][-1]


def curve(probes: Sequence[Sequence[Probe]]) -> list[Allocation]:
    """The front of time against error: from the least error to the least time."""
    front = [_Point(0.0, 0.0)]
    for found in probes:
        options = [point.probe for point in _front(_Point(q.error, q.us, q) for q in found) if point.probe is not None]
        front = _front(_Point(p.error + q.error, p.us + q.us, q, p) for p in front for q in options)
    return [_allocation(point) for point in front]


def uniform(probes: Sequence[Sequence[Probe]], scheme: str) -> Allocation | None:
    """Every unit in one scheme; None where one has no probe of it."""
    chosen = [next((probe for probe in found if probe.scheme == scheme), None) for found in probes]
    kept = [probe for probe in chosen if probe is not None]
    if len(kept) < len(chosen):
        return None
    schemes = {site: scheme for probe in kept for site in probe.sites}
    return Allocation(schemes, sum(probe.error for probe in kept), sum(probe.us for probe in kept))


def _front(points: Iterable[_Point]) -> list[_Point]:
    kept: list[_Point] = []
    for point in sorted(points, key=lambda p: (p.error, p.us)):
        if not kept or point.us < kept[-1].us:
            kept.append(point)
    if len(kept) <= MOST_POINTS:
        return kept
    return [kept[i * (len(kept) - 1) // (MOST_POINTS - 1)] for i in range(MOST_POINTS)]


def _allocation(point: _Point) -> Allocation:
    parts, at = [], point
    while at.probe is not None and at.before is not None:
        parts.append(dict.fromkeys(at.probe.sites, at.probe.scheme))
        at = at.before
    schemes = {site: scheme for part in reversed(parts) for site, scheme in part.items()}
    return Allocation(schemes, point.error, point.us)
