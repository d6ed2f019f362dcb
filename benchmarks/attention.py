"""Fused attention against scaled_dot_product_attention: ``python benchmarks/attention.py [--isa avx2] [--threads 2]``.

Calls are interleaved. A figure is the 15th percentile of its times; the ratio is the median of the ratios of neighbouring
calls. GOP/s counts 4 H N M d (half of it under a causal mask), and the last column is the share of what fused multiply-adds
reach in the same run: a loop of independent ones, compiled here and timed between the calls on one core, times the threads.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import SETTLE_S
from models import AVX2
from torch.nn.functional import scaled_dot_product_attention

import fxquant.ops  # noqa: F401 - defines the operators
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import find_compiler, load_library
from fxquant.lowering.isa import current_isa

# queries, keys, head size, causal, mask
CASES = (
    (128, 128, 32, False, None),
    (128, 128, 64, False, None),
    (197, 197, 32, False, None),
    (197, 197, 64, False, None),
    (128, 128, 64, False, "float"),
    (128, 128, 64, False, "bool"),
    (1024, 1024, 64, False, None),
    (1024, 1024, 64, True, None),
    (1, 1024, 64, False, None),
    (1, 1024, 64, False, "float"),
    (1, 64, 64, False, None),
    (4, 4, 32, False, None),
    (16, 16, 32, False, None),
    (32, 32, 64, False, None),
)
HEADS = 12
PROBE = r"""
#include <immintrin.h>
extern "C" double run(long steps) {  // 10 independent sums: 16 operations an instruction
  const __m256 x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(1.f);
  __m256 a = y, b = y, c = y, d = y, e = y, f = y, g = y, h = y, k = y, l = y;
  for (long i = 0; i < steps; i++) {
#define STEP(v) asm volatile("vfmadd213ps %2, %1, %0" : "+x"(v) : "x"(x), "x"(y));
    STEP(a) STEP(b) STEP(c) STEP(d) STEP(e) STEP(f) STEP(g) STEP(h) STEP(k) STEP(l)
  }
  return a[0] + b[0] + c[0] + d[0] + e[0] + f[0] + g[0] + h[0] + k[0] + l[0];
}
"""


def main() -> None:
    """A table of times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch, oneDNN and MKL to AVX2 too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="time of one row")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    torch.set_num_threads(options.threads)
    load_library(isa=ISAS.index(options.isa) if options.isa else None)
    probe = fma_probe(options.threads)
    print(
        f"torch {torch.backends.cpu.get_cpu_capability()}, fxquant {current_isa()}, {options.threads} threads, {HEADS} heads\n"
    )
    print("| N x M x d | | us | SDPA, us | ratio | GOP/s | share of FMA peak |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        compare(case, options.seconds, probe)


@torch.no_grad()
def compare(case: tuple[int, int, int, bool, str | None], seconds: float, probe: Callable[[], float]) -> None:
    """One row of the table."""
    n, m, d, causal, kind = case
    q, k, v = (torch.randn(1, rows, HEADS, d).transpose(1, 2) for rows in (n, m, m))
    mask = {None: None, "float": torch.zeros(1, 1, n, m), "bool": torch.ones(n, m, dtype=torch.bool)}[kind]
    op = torch.ops.fxquant.attention.default
    own, theirs, peaks = [], [], []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(own) < 8:
        for _ in range(8):
            theirs.append(spent(lambda: scaled_dot_product_attention(q, k, v, mask, is_causal=causal)))
            own.append(spent(lambda: op(q, k, v, mask, causal, None)))
        peaks.append(probe())
    ratio = statistics.median(b / a for a, b in zip(own, theirs, strict=True))
    low, base = (sorted(times)[len(times) * 15 // 100] for times in (own, theirs))
    gops = 4 * HEADS * n * m * d / (2 if causal else 1) / low / 1e9
    what = "causal" if causal else f"{kind} mask" if kind else ""
    peak = max(peaks)
    print(
        f"| {n}x{m}x{d} | {what} | {1e6 * low:.0f} | {1e6 * base:.0f} | {ratio:.2f} | {gops:.0f} | {gops / peak:.0%} |",
        flush=True,
    )


def spent(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def fma_probe(threads: int) -> Callable[[], float]:
    """A function that measures GOP/s of fused multiply-adds: one core's, times the threads."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(PROBE)
        command = [find_compiler(), "-O2", "-mavx2", "-mfma", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        run, steps = ctypes.CDLL(str(library)).run, 100_000

    def probe() -> float:
        time.sleep(SETTLE_S)
        return threads * steps * 10 * 16 / spent(lambda: run(ctypes.c_long(steps))) / 1e9

    return probe


if __name__ == "__main__":
    main()
