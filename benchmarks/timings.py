"""Measures the table behind ``auto``: ``python benchmarks/timings.py [--isa avx2]`` writes lowering/timings_<isa>.json.

Microseconds of F.linear, of our float kernel and of schemes on a grid of sizes, interleaved in one process; the figure of a
call is the 15th percentile of its times, for all sides alike. ``--isa avx2`` holds torch, oneDNN and MKL to AVX2 too.

A point is measured again while the machine was busy around it, or its neighbours on the grid disagree and no second
measurement has confirmed it (steady.py). Where too many such points are left after ``--minutes``, nothing is written.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import Call, machine, measure
from kernels import figures
from models import AVX2
from steady import GAUGE, Grid, Point, Spent, busy_points, confirmed, jumps
from torch.nn.functional import linear

import fxquant.ops  # noqa: F401 - defines the operators
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import load_library
from fxquant.lowering.isa import available_isas
from fxquant.lowering.pack import pack_linear
from fxquant.lowering.timings import FLOAT, OWN_FLOAT, parse_table, table_path
from fxquant.schemes import SCHEMES

ROWS, FEATURES = (1, 4, 16, 64, 256), (64, 256, 1024, 3072)
AXES = (ROWS, FEATURES, FEATURES)
POINTS = math.prod(map(len, AXES))
MEASURED = ("w8a8", "w8a7", "w7a7", "w6a6")  # those of auto, and two that are often asked for
RUNNERS = (FLOAT, OWN_FLOAT, *MEASURED)
BUSY_MACHINE = "the machine was busy"
GAUGE_SIZE = (64, 256, 256)
DOUBTFUL = 0.05  # of all points may be left unsteady: a wrong time of one point misleads few sites


def main() -> None:
    """Measure the whole grid and write the table, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch, oneDNN and MKL to AVX2 too")
    parser.add_argument("--seconds", type=float, default=1.0, help="for one point of the grid")
    parser.add_argument("--minutes", type=float, default=5.0, help="nothing is measured after this long")
    parser.add_argument("--out", type=Path, help="instead of lowering/timings_<isa>.json")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    isa = options.isa or available_isas()[-1]
    load_library(isa=ISAS.index(isa))
    grid, left = steady_grid(options.seconds, time.monotonic() + 60 * options.minutes)
    left |= {point: "there was no time for it" for point in product(*AXES) if point not in grid}
    for point, why in left.items():
        print(f"unsteady: {'x'.join(map(str, point))}: {why}")
    if len(grid) < POINTS or len(left) > DOUBTFUL * POINTS:
        sys.exit(f"not written: {len(left)} of {POINTS} points are unsteady; run it again on a quiet machine, or for longer")
    text = json.dumps(as_table(grid, machine(isa)))
    parse_table(text)
    path = options.out or table_path(isa)
    path.write_text(text + "\n")
    print(f"written: {path}")


def steady_grid(seconds: float, end: float) -> tuple[Grid, dict[Point, str]]:
    """Every point, those in doubt measured again until ``end``, and what is still in doubt then."""
    grid: Grid = {}
    for point in product(*AXES):
        if time.monotonic() > end:
            return grid, {}
        grid[point] = times(*point, seconds)
        show(point, grid)
    accepted: set[tuple[Point, str]] = set()
    while (left := doubts(grid, accepted)) and time.monotonic() < end:
        busy = [point for point, why in left.items() if why == BUSY_MACHINE]  # first: their neighbours are blamed for them
        for point in busy or left:
            if time.monotonic() > end:
                break
            again = times(*point, seconds)
            accepted |= {(point, name) for name, spent in again.items() if confirmed(grid[point][name], spent)}
            grid[point] = {name: spent.best(again[name]) for name, spent in grid[point].items()}
            show(point, grid)
    return grid, doubts(grid, accepted)


def doubts(grid: Grid, accepted: set[tuple[Point, str]]) -> dict[Point, str]:
    """Point → why it is to be measured again. Neighbours have no say about a time that a second measurement confirmed."""
    off = {name: jumps(AXES, column(grid, name)) for name in RUNNERS}
    found = {
        point: f"its neighbours disagree about {name}"
        for name in RUNNERS
        for point in off[name]
        if (point, name) not in accepted
    }
    return found | dict.fromkeys(busy_points(grid), BUSY_MACHINE)


def column(grid: Grid, name: str) -> dict[Point, float]:
    """Microseconds of one runner."""
    return {point: runners[name].us for point, runners in grid.items()}


def show(point: Point, grid: Grid) -> None:
    """One line for a point that was measured."""
    print(*point, {name: round(spent.us, 2) for name, spent in grid[point].items()}, flush=True)


@torch.no_grad()
def times(m: int, k: int, n: int, seconds: float) -> dict[str, Spent]:
    """Every runner at one point of the grid, and the gauge."""
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    rows, inner, columns = GAUGE_SIZE
    calls: dict[str, Call] = {
        GAUGE: partial(linear, torch.randn(rows, inner), torch.randn(columns, inner)),
        FLOAT: partial(linear, x, weight, bias),
        OWN_FLOAT: partial(torch.ops.fxquant.linear_float.default, x, torch.ops.fxquant.pack_float(weight), bias, n),
    }
    # The graphs that we compile hold the schemes as generated code: inference tensors spare them an operator's autograd layer.
    with torch.inference_mode():
        x, bias = x.clone(), bias.clone()
        for name in MEASURED:
            scheme = SCHEMES[name]
            op, packed = torch.ops.fxquant.linear_dynamic.default, pack_linear(weight, scheme)
            calls[name] = partial(op, x, packed, bias, n, scheme.weight_bits, scheme.act_bits)
    measured = measure(calls, rounds=2000, seconds=seconds, settle=0.0)
    return {name: Spent(figures(row)[0], 1e6 * min(row.times)) for name, row in measured.items()}


def as_table(grid: Grid, info: dict[str, Any]) -> dict[str, Any]:
    """What the file holds: lowering/timings.py reads it."""
    us = {name: [[[round(grid[m, k, n][name].us, 2) for n in FEATURES] for k in FEATURES] for m in ROWS] for name in RUNNERS}
    return {"cpu": info["cpu"], "threads": info["threads"], "m": ROWS, "k": FEATURES, "n": FEATURES, "us": us}


if __name__ == "__main__":
    main()
