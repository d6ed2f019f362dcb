"""Measures the table behind ``auto``: ``python benchmarks/timings.py [--isa avx2]`` writes lowering/timings_<isa>.json.

Microseconds of F.linear and of each scheme on a grid of sizes, interleaved in one process; the figure of a call is the 15th
percentile of its times, for both sides alike. ``--isa avx2`` holds torch, oneDNN and MKL to AVX2 too.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial

import torch
from harness import Call, machine, measure
from kernels import figures
from models import AVX2
from torch.nn.functional import linear

import fxquant.ops  # noqa: F401 - defines the operators
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import load_library
from fxquant.lowering.isa import available_isas
from fxquant.lowering.pack import pack_linear
from fxquant.lowering.timings import FLOAT, table_path
from fxquant.schemes import SCHEMES

ROWS, FEATURES = (1, 4, 16, 64, 256), (64, 256, 1024, 3072)
SCHEMES_OF_AUTO = ("w8a8", "w8a7", "w7a7")


def main() -> None:
    """Measure the whole grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch, oneDNN and MKL to AVX2 too")
    parser.add_argument("--seconds", type=float, default=1.0, help="for one point of the grid")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    isa = options.isa or available_isas()[-1]
    load_library(isa=ISAS.index(isa))
    info = machine(isa)
    us: dict[str, list[list[list[float]]]] = {name: [] for name in (FLOAT, *SCHEMES_OF_AUTO)}
    for m in ROWS:
        planes = {name: [[0.0] * len(FEATURES) for _ in FEATURES] for name in us}
        for i, k in enumerate(FEATURES):
            for j, n in enumerate(FEATURES):
                for name, spent in point(m, k, n, options.seconds).items():
                    planes[name][i][j] = round(spent, 2)
                print(m, k, n, {name: planes[name][i][j] for name in us}, flush=True)
        for name in us:
            us[name].append(planes[name])
    table = {"cpu": info["cpu"], "threads": info["threads"], "m": ROWS, "k": FEATURES, "n": FEATURES, "us": us}
    table_path(isa).write_text(json.dumps(table) + "\n")
    print(f"written: {table_path(isa)}")


@torch.no_grad()
def point(m: int, k: int, n: int, seconds: float) -> dict[str, float]:
    """Microseconds of every runner at one point of the grid."""
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    calls: dict[str, Call] = {FLOAT: partial(linear, x, weight, bias)}
    for name in SCHEMES_OF_AUTO:
        scheme = SCHEMES[name]
        op, packed = torch.ops.fxquant.linear_dynamic.default, pack_linear(weight, scheme)
        calls[name] = partial(op, x, packed, bias, n, scheme.weight_bits, scheme.act_bits)
    rows = measure(calls, rounds=2000, seconds=seconds, settle=0.0)
    return {name: figures(row)[0] for name, row in rows.items()}


if __name__ == "__main__":
    main()
