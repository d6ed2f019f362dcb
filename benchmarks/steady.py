"""Which points of a measured grid cannot be trusted: the machine was busy, or the neighbours on the grid say otherwise.

Another process only ever adds time. So of two measurements of a point the smaller is nearer the truth, and a gauge, one call
that is the same at every point and takes its turn among the others, shows how busy the machine was around each of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Point = tuple[int, ...]
GAUGE = "gauge"
BUSY = 1.3  # the gauge's percentile at a point over its fastest sample anywhere
JUMP = 1.5  # the time of a point over what its neighbours along an axis say
AGREE = 1.1  # two measurements of a point that confirm each other


@dataclass(frozen=True)
class Spent:
    """Microseconds of one runner at one point: the reported percentile and the fastest sample."""

    us: float
    fastest: float

    def best(self, other: "Spent") -> "Spent":
        """The smaller of two measurements."""
        return Spent(min(self.us, other.us), min(self.fastest, other.fastest))


Grid = dict[Point, dict[str, Spent]]


def busy_points(grid: Grid) -> set[Point]:
    """Points at which the gauge took more than ``BUSY`` times its fastest sample anywhere."""
    quiet = min(runners[GAUGE].fastest for runners in grid.values())
    return {point for point, runners in grid.items() if runners[GAUGE].us > BUSY * quiet}


def jumps(axes: Sequence[Sequence[int]], us: Mapping[Point, float]) -> set[Point]:
    """Points more than ``JUMP`` off the line, in logarithms, through both their neighbours along an axis."""
    return {point for point in us if any(_is_off(axes[i], i, point, us) for i in range(len(axes)))}


def confirmed(first: Mapping[str, Spent], second: Mapping[str, Spent]) -> bool:
    """Whether two measurements of a point agree for every runner."""
    return all(max(a.us, b.us) <= AGREE * min(a.us, b.us) for a, b in ((first[name], second[name]) for name in first))


def _is_off(axis: Sequence[int], i: int, point: Point, us: Mapping[Point, float]) -> bool:
    at = axis.index(point[i])
    if at in (0, len(axis) - 1):
        return False
    low, high = (us[*point[:i], axis[j], *point[i + 1 :]] for j in (at - 1, at + 1))
    share = math.log(axis[at] / axis[at - 1]) / math.log(axis[at + 1] / axis[at - 1])
    expected = low ** (1 - share) * high**share
    return not 1 / JUMP <= us[point] / expected <= JUMP
