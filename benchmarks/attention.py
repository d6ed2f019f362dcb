"""Fused attention against scaled_dot_product_attention: ``python benchmarks/attention.py [--isa avx2] [--threads 2]``.

Calls are interleaved. A figure is the 15th percentile of its times; the ratio is the median of the ratios of neighbouring
calls. GOP/s counts 4 H N M d (half of it under a causal mask). The last column is the share of its bound: the time of both
products, each at the rate of its own instruction (a loop of independent ones, compiled here and timed between the calls on
one core, times the threads), over the time of the call; softmax has no part in the bound. The peak is the best of all runs
of its loop; where those among a row's calls stayed far below it, "busy" stands in place of the share. The instruction is
fused multiply-add for float, and with AVX2 vpmaddubsw for 6-bit codes and vpmaddwd for 8-bit codes. Elsewhere (vpdpbusd)
only float has a bound.

Rows with a scheme end with the cosine to exact attention on the same normally distributed data.
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
from steady import Peak, share_of_bound
from torch.nn.functional import scaled_dot_product_attention

import fxquant.ops  # noqa: F401 - defines the operators
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import find_compiler, load_library
from fxquant.lowering.isa import current_isa
from fxquant.schemes import ATTENTION_SCHEMES

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
SCHEMES = ("qk6", "qk8", "qk6-pv8", "qk8-pv8")
SCHEME_CASES = CASES[:4] + CASES[6:8]
# What bounds the product of q and k, and that of weights and v, on AVX2.
BOUNDS = {
    None: ("fma", "fma"),
    "qk6": ("maddubs", "fma"),
    "qk8": ("maddwd", "fma"),
    "qk6-pv8": ("maddubs", "maddwd"),
    "qk8-pv8": ("maddwd", "maddwd"),
}
PROBE = r"""
#include <immintrin.h>
extern "C" double fma(long steps) {  // 10 independent sums: 16 operations an instruction
  const __m256 x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(1.f);
  __m256 a = y, b = y, c = y, d = y, e = y, f = y, g = y, h = y, k = y, l = y;
  for (long i = 0; i < steps; i++) {
#define STEP(v) asm volatile("vfmadd213ps %2, %1, %0" : "+x"(v) : "x"(x), "x"(y));
    STEP(a) STEP(b) STEP(c) STEP(d) STEP(e) STEP(f) STEP(g) STEP(h) STEP(k) STEP(l)
  }
  return a[0] + b[0] + c[0] + d[0] + e[0] + f[0] + g[0] + h[0] + k[0] + l[0];
}
#define SUM(NAME, MULTIPLY, ADD)                                                                            \
  extern "C" double NAME(long steps) {  /* the same with integers; a multiplication and an addition a step */ \
    const __m256i x = _mm256_set1_epi8(1), y = x;                                                           \
    __m256i a = y, b = y, c = y, d = y, e = y, f = y, g = y, h = y, k = y, l = y;                           \
    for (long i = 0; i < steps; i++) {                                                                      \
      STEP2(a, MULTIPLY, ADD) STEP2(b, MULTIPLY, ADD) STEP2(c, MULTIPLY, ADD) STEP2(d, MULTIPLY, ADD)       \
      STEP2(e, MULTIPLY, ADD) STEP2(f, MULTIPLY, ADD) STEP2(g, MULTIPLY, ADD) STEP2(h, MULTIPLY, ADD)       \
      STEP2(k, MULTIPLY, ADD) STEP2(l, MULTIPLY, ADD)                                                       \
    }                                                                                                       \
    a = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));                                   \
    e = _mm256_add_epi32(_mm256_add_epi32(e, f), _mm256_add_epi32(g, h));                                   \
    return _mm256_extract_epi32(_mm256_add_epi32(_mm256_add_epi32(a, e), _mm256_add_epi32(k, l)), 0);       \
  }
#define STEP2(v, MULTIPLY, ADD)                                                                       \
  {                                                                                                   \
    __m256i t;                                                                                        \
    asm volatile(MULTIPLY " %2, %3, %1\n\t" ADD " %1, %0, %0" : "+x"(v), "=&x"(t) : "x"(x), "x"(y)); \
  }
SUM(maddubs, "vpmaddubsw", "vpaddw")
SUM(maddwd, "vpmaddwd", "vpaddd")
"""
OPERATIONS = {"fma": 16, "maddubs": 64, "maddwd": 32}  # of an instruction
WARM_UP = 20  # runs of every loop before the first row
RUNS = 5  # of a loop between two blocks of calls


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
    probe = prober(options.threads)
    peaks = {name: Peak() for name in OPERATIONS}
    for _ in range(WARM_UP):
        probe(peaks)
    print(
        f"torch {torch.backends.cpu.get_cpu_capability()}, fxquant {current_isa()}, {options.threads} threads, {HEADS} heads\n"
    )
    print("| N x M x d | | us | SDPA, us | ratio | GOP/s | share of its bound | cosine |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        compare(case, None, options.seconds, peaks, probe)
    for case in SCHEME_CASES:
        for scheme in SCHEMES:
            compare(case, scheme, options.seconds, peaks, probe)


@torch.no_grad()
def compare(
    case: tuple[int, int, int, bool, str | None],
    scheme: str | None,
    seconds: float,
    peaks: dict[str, Peak],
    probe: Callable[[dict[str, Peak]], None],
) -> None:
    """One row of the table."""
    n, m, d, causal, kind = case
    q, k, v = (torch.randn(1, rows, HEADS, d).transpose(1, 2) for rows in (n, m, m))
    mask = {None: None, "float": torch.zeros(1, 1, n, m), "bool": torch.ones(n, m, dtype=torch.bool)}[kind]
    call = kernel(scheme)
    bound = BOUNDS[scheme] if scheme is None or current_isa() == "avx2" else ()
    own, theirs = [], []
    for peak in peaks.values():
        peak.forget()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(own) < 8:
        for _ in range(8):
            theirs.append(spent(lambda: scaled_dot_product_attention(q, k, v, mask, is_causal=causal)))
            own.append(spent(lambda: call(q, k, v, mask, causal, None)))
        probe({name: peaks[name] for name in bound})
    ratio = statistics.median(b / a for a, b in zip(own, theirs, strict=True))
    low, base = (sorted(times)[len(times) * 15 // 100] for times in (own, theirs))
    product = 2 * HEADS * n * m * d / (2 if causal else 1) / 1e9
    what = ", ".join(word for word in ("causal" if causal else f"{kind} mask" if kind else "", scheme or "") if word)
    share = share_of_bound([(product, peaks[name]) for name in bound], low) if bound else ""
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, is_causal=causal) if scheme else None
    close = "" if exact is None else f"{cosine(call(q, k, v, mask, causal, None), exact):.4f}"
    times = f"{1e6 * low:.0f} | {1e6 * base:.0f} | {ratio:.2f} | {2 * product / low:.0f}"
    print(f"| {n}x{m}x{d} | {what} | {times} | {share} | {close} |", flush=True)


def kernel(scheme: str | None) -> Callable[..., torch.Tensor]:
    """Attention as an operator that takes q, k, v, mask, is_causal and scale."""
    if scheme is None:
        return torch.ops.fxquant.attention.default  # type: ignore[no-any-return]
    bits = ATTENTION_SCHEMES[scheme]
    return lambda *args: torch.ops.fxquant.attention_int.default(*args, bits.qk_bits, bits.pv_bits)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of both as one vector."""
    return float(torch.cosine_similarity(a.double().flatten(), b.flatten(), dim=0))


def spent(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def prober(threads: int) -> Callable[[dict[str, Peak]], None]:
    """A function that adds runs of loops, in GOP/s of one core times the threads, to some peaks."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(PROBE)
        command = [find_compiler(), "-O2", "-mavx2", "-mfma", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        loaded, steps = ctypes.CDLL(str(library)), 100_000

    def probe(peaks: dict[str, Peak]) -> None:
        time.sleep(SETTLE_S)
        for _ in range(RUNS):
            for name, peak in peaks.items():
                taken = spent(lambda name=name: loaded[name](ctypes.c_long(steps)))  # type: ignore[misc]
                peak.add(threads * steps * 10 * OPERATIONS[name] / taken / 1e9)

    return probe


if __name__ == "__main__":
    main()
