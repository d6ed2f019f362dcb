"""One linear, dynamic quantization included, against float: ``python benchmarks/kernels.py [--isa avx2] [--threads 1]``.

There are two float baselines: F.linear (MKL, which on AMD runs AVX2 code whatever the CPU has) and oneDNN with a weight
packed ahead, the stronger one where there is AVX-512. Caches are warm: each call is repeated a few times in its turn.

Calls are interleaved. The figure of a call is the 15th percentile of its times, for both sides alike: on a shared machine
the median of a two-thread call mostly measures the neighbours. The column "median" (over that percentile) shows how busy
the machine was; far from 1.0 a row says little.

The column "of peak" is the fraction of what peak.cpp, run before the rows, reaches with registers alone: vpmaddubsw and
vpaddw for schemes of up to 15 bits on AVX2, vpmaddwd and vpaddd for w8a8. VNNI has no such column.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from harness import Call, Row, measure
from models import AVX2
from torch.nn.functional import linear

import fxquant.ops  # noqa: F401 - defines the operators
from fxquant.config import ISAS
from fxquant.linear_formats import format_of
from fxquant.lowering.cpu.build import find_compiler, load_library
from fxquant.lowering.isa import available_isas
from fxquant.lowering.pack import pack_linear
from fxquant.schemes import Scheme, parse_scheme

SHAPES = (
    (128, 384, 1536),
    (128, 1536, 384),
    (128, 384, 384),
    (1024, 384, 1536),
    (197, 768, 3072),
    (16, 768, 3072),
    (1, 768, 3072),
)
QUICK = SHAPES[:2]
DEFAULT = ("w8a8", "w8a7", "w7a7", "w6a8", "w6a6", "w4a8", "w4a4")


def main() -> None:
    """A table of ratios for every shape, scheme and instruction set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch, oneDNN and MKL to AVX2 too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--schemes", nargs="*", default=DEFAULT)
    parser.add_argument("--shapes", nargs="*", help="as MxKxN")
    parser.add_argument("--quick", action="store_true", help="two shapes, one second each")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    torch.set_num_threads(options.threads)
    isas = [options.isa] if options.isa else [isa for isa in available_isas() if isa != "scalar"]
    print(f"torch capability {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    limits = peaks(options.threads)
    print(", ".join(f"{name} {rate:.0f} {unit}" for name, unit, rate in zip(limits, UNITS, limits.values(), strict=True)), "\n")
    schemes = [parse_scheme(name) for name in options.schemes]
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes or ()] or (QUICK if options.quick else SHAPES)
    print(
        "| M x K x N | scheme | instruction set | us | median | GOP/s | of peak "
        "| F.linear, us | median | ratio | oneDNN, us | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        for isa in isas:
            compare(shape, isa, schemes, limits, seconds=1.0 if options.quick else 6.0)


UNITS = ("GOP/s", "GOP/s", "GOP/s", "GB/s from L3", "GB/s from memory")


@cache
def probe() -> Path:
    """The built peak.cpp."""
    program = Path(tempfile.mkdtemp()) / "peak"
    source = str(Path(__file__).with_name("peak.cpp"))
    subprocess.run([find_compiler(), "-std=c++20", "-O2", "-mavx2", "-mfma", "-pthread", source, "-o", program], check=True)
    return program


def peaks(threads: int) -> dict[str, float]:
    """Rates of fma, maddubs, maddwd (GOP/s) and of reads from cache and memory (GB/s) that all threads reach together."""
    out = subprocess.run([probe(), str(threads)], check=True, capture_output=True, text=True).stdout
    return {name: float(rate) for name, rate in (line.split() for line in out.splitlines())}


@torch.inference_mode()  # no_grad would add Python's autograd wrapper of a custom operator: 5 us a call
def compare(shape: tuple[int, ...], isa: str, schemes: list[Scheme], limits: dict[str, float], seconds: float) -> None:
    """All schemes on one shape and instruction set."""
    m, k, n = shape
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    load_library(isa=ISAS.index(isa))
    ahead = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    calls: dict[str, Call] = {
        "float": partial(linear, x, weight, bias),
        "oneDNN": partial(torch.ops.mkldnn._linear_pointwise.default, x, ahead, bias, "none", [], ""),
    }
    for scheme in schemes:
        packed = pack_linear(weight, scheme)
        form = format_of(scheme)
        calls[str(scheme)] = partial(form.overload, x, packed, bias, n, *form.extra(scheme))
    rows = measure(calls, rounds=2000, seconds=seconds)
    (base, base_busy), (ahead_us, _) = figures(rows["float"]), figures(rows["oneDNN"])
    for scheme in schemes:
        spent, busy = figures(rows[str(scheme)])
        limit = limits["maddwd" if str(scheme) == "w8a8" else "maddubs"]
        gops = 2 * m * k * n / spent / 1e3
        of_peak = f"{gops / limit:.2f}" if isa == "avx2" else ""
        print(
            f"| {m}x{k}x{n} | {scheme} | {isa} | {spent:.0f} | {busy:.2f} | {gops:.0f} | {of_peak} "
            f"| {base:.0f} | {base_busy:.2f} | {base / spent:.2f} | {ahead_us:.0f} | {ahead_us / spent:.2f} |",
            flush=True,
        )


def figures(row: Row) -> tuple[float, float]:
    """Microseconds of a call, and the median over them."""
    times = sorted(row.times)
    spent = times[len(times) * 15 // 100]
    return 1e6 * spent, statistics.median(times) / spent


if __name__ == "__main__":
    main()
