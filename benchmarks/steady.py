"""Which points of a measured grid cannot be trusted: the machine was busy, or the neighbours on the grid say otherwise.

Another process only ever adds time. So of two measurements of a point the smaller is nearer the truth, and a gauge, one call
that is the same at every point and takes its turn among the others, shows how busy the machine was around each of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Point = tuple[int, ...]
GAUGE = "gauge"
BUSY = 1.2  # the gauge's percentile at a point over its fastest sample anywhere; quiet, it varies by 4 %
JUMP = 1.5  # the time of a point over what its neighbours along an axis say
AGREE = 1.15  # two measurements that confirm each other
BUSY_MACHINE = "busy"


@dataclass(frozen=True)
class Spent:
    """Microseconds of one runner at one point: the reported percentile and the fastest sample."""

    us: float
    fastest: float

    def best(self, other: "Spent") -> "Spent":
        """The smaller of two measurements."""
        return Spent(min(self.us, other.us), min(self.fastest, other.fastest))


@dataclass
class Peak:
    """The rate of a loop of one instruction: the best of all runs, and of those since ``forget``.

    A disturbed run is slower, never faster, so the best of all is what the machine can do.
    """

    best: float = 0.0
    lately: list[float] = field(default_factory=list)

    def add(self, rate: float) -> None:
        """Count one run."""
        self.best = max(self.best, rate)
        self.lately.append(rate)

    def forget(self) -> None:
        """Begin a new row: the machine may have become busy, or quiet."""
        self.lately.clear()

    @property
    def is_disturbed(self) -> bool:
        """Whether fewer than one in seven of the runs since ``forget`` came near the best: calls among them did no better."""
        rates = sorted(self.lately, reverse=True)
        return not rates or BUSY * rates[len(rates) * 15 // 100] < self.best


def share_of_bound(work: Sequence[tuple[float, Peak]], seconds: float) -> str:
    """The time that some work takes at its peak rates over ``seconds``; "busy" where the machine was, or above 100 %.

    ``work`` is operations (in the unit of the rate, times seconds) and the peak of the instruction that does them.
    """
    share = sum(operations / peak.best for operations, peak in work) / seconds
    return BUSY_MACHINE if share > 1 or any(peak.is_disturbed for _, peak in work) else f"{share:.0%}"


Grid = dict[Point, dict[str, Spent]]


def busy_points(grid: Grid) -> set[Point]:
    """Points at which the gauge took more than ``BUSY`` times its fastest sample anywhere."""
    quiet = min(runners[GAUGE].fastest for runners in grid.values())
    return {point for point, runners in grid.items() if runners[GAUGE].us > BUSY * quiet}


def jumps(axes: Sequence[Sequence[int]], us: Mapping[Point, float]) -> set[Point]:
    """Points more than ``JUMP`` off the line, in logarithms, through both their neighbours along an axis.

    The last point of an axis has one neighbour, and must not take that much longer for each operation.
    """
    return {point for point in us if any(_is_off(axes[i], i, point, us) for i in range(len(axes)))}


def confirmed(first: Spent, second: Spent) -> bool:
    """Whether two measurements agree."""
    return max(first.us, second.us) <= AGREE * min(first.us, second.us)


def _is_off(axis: Sequence[int], i: int, point: Point, us: Mapping[Point, float]) -> bool:
    at = axis.index(point[i])
    if at == 0:
        return False
    low = us[*point[:i], axis[at - 1], *point[i + 1 :]]
    if at == len(axis) - 1:
        return us[point] > JUMP * low * axis[at] / axis[at - 1]
    high = us[*point[:i], axis[at + 1], *point[i + 1 :]]
    share = math.log(axis[at] / axis[at - 1]) / math.log(axis[at + 1] / axis[at - 1])
    return not 1 / JUMP <= us[point] / (low ** (1 - share) * high**share) <= JUMP
