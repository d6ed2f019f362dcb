import math

import pytest

from fxquant.lowering.timings import Table, Timing, linear_timing

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


def test_a_gain_must_be_more_than_noise() -> None:
    assert Timing(100.0, 95.0).is_gain
    assert not Timing(100.0, 96.0).is_gain


def test_no_table_no_promise() -> None:
    assert linear_timing("scalar", "w8a8", 8, 64, 64) is None
    assert linear_timing("avx2", "no scheme", 8, 64, 64) is None
