import json
import math
from pathlib import Path
from typing import Any

import pytest

from fxquant import lowering
from fxquant.config import ISAS
from fxquant.lowering import timings
from fxquant.lowering.timings import FLOAT, OWN_FLOAT, Table, linear_timing, parse_table, table_path
from fxquant.schemes import choose_scheme

GRID = Table("a CPU", 2, (1, 16), (64, 256), (64, 1024), {"float": [[[1.0, 8.0], [4.0, 32.0]], [[4.0, 32.0], [16.0, 128.0]]]})


def test_grid_points_are_met_exactly() -> None:
    assert GRID.predict("float", 16, 64, 1024) == pytest.approx(32.0)
    assert GRID.predict("float", 1, 256, 64) == pytest.approx(4.0)


def test_between_points_the_time_of_one_operation_is_interpolated_in_logarithms() -> None:
    ends = [GRID.predict("float", m, 64, 64) / m for m in (1, 16)]
    assert GRID.predict("float", 4, 64, 64) == pytest.approx(4 * math.sqrt(ends[0] * ends[1]))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (10**6, 64, 64), (3, 10**5, 7)])
def test_beyond_the_edge_the_time_of_one_operation_stays(m: int, k: int, n: int) -> None:
    inside = GRID.predict("float", min(max(m, 1), 16), min(max(k, 64), 256), min(max(n, 64), 1024))
    inside /= min(max(m, 1), 16) * min(max(k, 64), 256) * min(max(n, 64), 1024)
    assert GRID.predict("float", m, k, n) == pytest.approx(inside * m * k * n)


def test_a_promise_is_of_three_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    cubes = {name: [[[us] * 2] * 2] * 2 for name, us in {"float": 9.0, "linear_float": 7.0, "w8a8": 4.0}.items()}
    monkeypatch.setattr(timings, "load_table", lambda isa: Table("a CPU", 2, (1, 16), (64, 256), (64, 1024), cubes))
    promised = linear_timing("avx2", "w8a8", 16, 64, 1024)
    assert promised is not None
    assert (promised.float_us, promised.own_float_us, promised.scheme_us) == pytest.approx((9.0, 7.0, 4.0))
    for scheme in ("no scheme", None):
        unknown = linear_timing("avx2", scheme, 16, 64, 1024)
        assert unknown is not None
        assert unknown.scheme_us is None
    assert linear_timing("avx2", "w8a8", 0, 64, 1024) is None


def test_no_table_no_promise() -> None:
    assert linear_timing("scalar", "w8a8", 8, 64, 64) is None


def table(**changes: Any) -> str:
    cube = [[[1.0] * 2] * 2] * 2
    return json.dumps(
        {"cpu": "a CPU", "threads": 2, "m": [1, 4], "k": [64, 256], "n": [64, 256], "us": {"float": cube}} | changes
    )


def test_a_file_becomes_a_table() -> None:
    assert parse_table(table()) == Table("a CPU", 2, (1, 4), (64, 256), (64, 256), {"float": [[[1.0] * 2] * 2] * 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": [4, 1]}, r"m must be two or more ascending sizes, not \[4, 1\]"),
        ({"k": [64]}, "k must be two or more ascending sizes"),
        ({"us": {"w8a8": [[[1.0] * 2] * 2]}}, r"'w8a8' has \[\(1, 2, 2\)\] times on a grid of \(2, 2, 2\)"),
        ({"us": {"w8a8": [[[1.0, 1.0], [1.0]], [[1.0] * 2] * 2]}}, "'w8a8' has"),
        ({"us": {"float": [[[1.0, 0.0]] * 2] * 2}}, "a time of 'float' is not above zero"),
        ({"us": {"float": [[[1.0, math.nan]] * 2] * 2}}, "a time of 'float' is not above zero"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_table(table(**changes))


def test_every_table_of_the_package_is_whole() -> None:
    """Every runner that ``auto`` weighs, at every point of the grid (the parser sees to that)."""
    found = {path.stem.removeprefix("timings_") for path in Path(lowering.__path__[0]).glob("timings_*.json")}
    assert found == {isa for isa in ISAS if table_path(isa).is_file()}
    for isa in found:
        measured = parse_table(table_path(isa).read_text())
        assert {FLOAT, OWN_FLOAT, str(choose_scheme(isa))} <= set(measured.us)
        assert measured.threads >= 1
