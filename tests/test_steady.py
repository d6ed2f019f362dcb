"""Which points of a measured grid the benchmark of the timings measures again."""

import importlib.util
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

AXES = ((1, 4, 16), (64, 256, 1024, 3072), (64, 256))
POINTS = list(product(*AXES))


@pytest.fixture(scope="module")
def steady() -> ModuleType:
    source = Path(__file__).parents[1] / "benchmarks" / "steady.py"
    spec = importlib.util.spec_from_file_location("benchmark_steady", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def smooth(point: tuple[int, ...]) -> float:
    """An operator's call and its work, in microseconds."""
    m, k, n = point
    return 5 + m * k * n / 3e4


def test_a_smooth_grid_has_no_jumps(steady: ModuleType) -> None:
    assert steady.jumps(AXES, {point: smooth(point) for point in POINTS}) == set()


@pytest.mark.parametrize("factor", [1.7, 1 / 1.7])
def test_a_point_off_the_line_of_its_neighbours_is_a_jump(steady: ModuleType, factor: float) -> None:
    us = {(m, k, n): float(m * k * n) for m, k, n in POINTS}
    us[4, 256, 64] *= factor
    assert (4, 256, 64) in steady.jumps(AXES, us)


def test_the_last_point_of_an_axis_must_not_take_longer_for_each_operation(steady: ModuleType) -> None:
    us = {(m, k, n): float(m * k * n) for m, k, n in POINTS}
    us[16, 3072, 256] *= 1.7
    assert steady.jumps(AXES, us) == {(16, 3072, 256)}


def test_the_machine_was_busy_where_the_gauge_took_long(steady: ModuleType) -> None:
    grid = {point: {"gauge": steady.Spent(31.0, 30.0), "float": steady.Spent(9.0, 8.0)} for point in POINTS}
    assert steady.busy_points(grid) == set()
    grid[1, 64, 64]["gauge"] = steady.Spent(60.0, 55.0)
    grid[1, 64, 256]["float"] = steady.Spent(90.0, 80.0)
    assert steady.busy_points(grid) == {(1, 64, 64)}


def test_a_machine_that_is_busy_all_the_time_is_told_by_its_fastest_sample(steady: ModuleType) -> None:
    grid = {point: {"gauge": steady.Spent(60.0, 55.0)} for point in POINTS}
    grid[1, 64, 64] = {"gauge": steady.Spent(60.0, 30.0)}
    assert steady.busy_points(grid) == set(POINTS)


def test_two_measurements_confirm_each_other_if_they_are_close(steady: ModuleType) -> None:
    first = steady.Spent(10.0, 9.0)
    assert steady.confirmed(first, steady.Spent(11.4, 10.0))
    assert steady.confirmed(first, steady.Spent(8.8, 8.0))
    assert not steady.confirmed(first, steady.Spent(11.6, 9.0))
    assert first.best(steady.Spent(11.0, 8.0)) == steady.Spent(10.0, 8.0)


def test_the_best_run_of_a_loop_is_its_peak(steady: ModuleType) -> None:
    peak = steady.Peak()
    for rate in (50, 100, 98, 40, 97):
        peak.add(rate)
    assert peak.best == 100
    assert not peak.is_disturbed
    assert steady.share_of_bound([(30, peak), (20, peak)], 1.0) == "50%"


def test_a_row_among_slow_runs_has_no_share(steady: ModuleType) -> None:
    peak = steady.Peak()
    assert peak.is_disturbed
    peak.add(100)
    peak.forget()
    for rate in (60, 70, 80, 75):
        peak.add(rate)
    assert peak.best == 100
    assert steady.share_of_bound([(50, peak)], 1.0) == "busy"
    for _ in range(4):
        peak.add(90)
    assert steady.share_of_bound([(50, peak)], 1.0) == "50%"
    assert steady.share_of_bound([(50, peak), (60, peak)], 1.0) == "busy"  # faster than the peak: no peak was seen
