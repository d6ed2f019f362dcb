"""How long a linear takes in float and in each scheme: the measured tables behind ``auto``, one an instruction set.

``timings_<isa>.json`` holds microseconds of ``F.linear``, of our float kernel and of each scheme, dynamic quantization
included, on a grid of rows x input features x output features; ``python benchmarks/timings.py`` measures one and says on
which CPU. Between the grid's points the time of one operation is interpolated in the logarithms of the sizes; beyond its
edge it stays as it is there.
"""

import functools
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

FLOAT, OWN_FLOAT = "float", "linear_float"  # runners of a table beside the schemes: F.linear, and our float kernel
GAIN = 0.95  # what replaces a linear must promise at most this much of its time: another CPU's table is off by a few percent


@dataclass(frozen=True)
class Timing:
    """Microseconds that the table promises for a linear with ``threads`` threads.

    By F.linear, by our float kernel and in a scheme (None: the table lacks it).
    """

    float_us: float
    own_float_us: float | None
    scheme_us: float | None
    threads: int


@dataclass(frozen=True)
class Table:
    """Grid of rows (m), input features (k) and output features (n), each ascending; runner → microseconds [m][k][n]."""

    cpu: str
    threads: int
    m: tuple[int, ...]
    k: tuple[int, ...]
    n: tuple[int, ...]
    us: dict[str, list[list[list[float]]]]

    def predict(self, runner: str, m: int, k: int, n: int) -> float:
        """Microseconds of ``runner`` (``float``, ``linear_float`` or a scheme) on an [m, k] x [k, n] product."""
        total = 0.0
        for corner, weight in _corners((self.m, self.k, self.n), (m, k, n)):
            i, j, h = corner
            spent = self.us[runner][i][j][h] / (self.m[i] * self.k[j] * self.n[h])
            total += weight * math.log(spent)
        return math.exp(total) * m * k * n


def linear_timing(isa: str, scheme: str | None, m: int, k: int, n: int) -> Timing | None:
    """What the table of an instruction set promises for an [m, k] x [k, n] product; None where there is no table."""
    table = load_table(isa)
    if table is None or min(m, k, n) < 1:
        return None

    def us(runner: str | None) -> float | None:
        return table.predict(runner, m, k, n) if runner in table.us else None

    return Timing(table.predict(FLOAT, m, k, n), us(OWN_FLOAT), us(scheme), table.threads)


@functools.cache
def load_table(isa: str) -> Table | None:
    """The measured table of an instruction set, or None."""
    path = table_path(isa)
    if not path.is_file():
        return None
    return parse_table(path.read_text())


def parse_table(text: str) -> Table:
    """The table that a file holds.

    Raises:
        ValueError: an axis does not ascend, a runner lacks a point of the grid, or a time is not above zero.
    """
    data = json.loads(text)
    m, k, n = (tuple(data[axis]) for axis in "mkn")
    for name, axis in zip("mkn", (m, k, n), strict=True):
        if len(axis) < 2 or any(low >= high for low, high in pairwise(axis)):
            raise ValueError(f"timings: {name} must be two or more ascending sizes, not {list(axis)}")
    for runner, planes in data["us"].items():
        shapes = {(len(planes), len(rows), len(row)) for rows in planes for row in rows}
        if shapes != {(len(m), len(k), len(n))}:
            raise ValueError(f"timings: {runner!r} has {sorted(shapes)} times on a grid of {(len(m), len(k), len(n))}")
        if not all(0 < us < math.inf for rows in planes for row in rows for us in row):
            raise ValueError(f"timings: a time of {runner!r} is not above zero")
    return Table(data["cpu"], data["threads"], m, k, n, data["us"])


def table_path(isa: str) -> Path:
    """Where the table of an instruction set is kept."""
    return Path(__file__).parent / f"timings_{isa}.json"


def _corners(axes: Sequence[Sequence[int]], point: Sequence[int]) -> Iterator[tuple[tuple[int, ...], float]]:
    """The grid points around a point, with the weight of each (multilinear in the logarithms)."""
    places = [_place(axis, size) for axis, size in zip(axes, point, strict=True)]
    for sides in product((0, 1), repeat=len(places)):
        weight = math.prod(share if side else 1 - share for side, (_, share) in zip(sides, places, strict=True))
        if weight > 0:
            yield tuple(low + side for side, (low, _) in zip(sides, places, strict=True)), weight


def _place(axis: Sequence[int], size: int) -> tuple[int, float]:
    """Index of the grid value below ``size``, and how far ``size`` lies towards the next one (0 .. 1)."""
    low = min(max(bisect_right(axis, size) - 1, 0), len(axis) - 2)
    share = math.log(size / axis[low]) / math.log(axis[low + 1] / axis[low])
    return low, min(max(share, 0.0), 1.0)
