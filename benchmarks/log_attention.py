"""Attention with published logarithmic codes: ``python benchmarks/log_attention.py [--isa avx2] [--threads 2] [--bits 4]``.

Each row is one method's codings of normally distributed q, k and v, through Inductor: in the kernel, as the compiled
specification (what runs where there is no kernel), and beside them float attention in our kernel and PyTorch's operator. Calls
are interleaved; a time is the 15th percentile, a ratio the median of the ratios of neighbouring calls. The last columns are how
many sums a row has, and the cosine of the kernel to exact attention and to the specification.
"""

import argparse
import os
import statistics
import subprocess
import sys
from typing import Any
from unittest.mock import patch

import torch
from attention import cosine, spent
from models import AVX2
from torch.nn.functional import scaled_dot_product_attention

import fxquant
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.recipes.attention import SeenAttention, choose_attention
from fxquant.lowering.isa import current_isa
from fxquant.passes.fuse import log_attention

CASES = ((128, 32), (197, 64))  # tokens, head size
HEADS = 12
METHODS = ("fq-vit", "repq", "adalog")
ROUNDS = 200


def main() -> None:
    """A table of times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch, oneDNN and MKL to AVX2 too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bits", type=int, default=4, choices=range(3, 8), help="of every operand")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    torch.set_num_threads(options.threads)
    print(f"fxquant {current_isa()}, {options.threads} threads, {HEADS} heads, {options.bits} bits\n")
    head = ("N x d", "", "us", "specification", "ratio", "float kernel", "ratio", "SDPA", "sums", "cosine", "to specification")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for tokens, depth in CASES:
        for method in METHODS:
            compare(tokens, depth, method, options.bits)


@torch.no_grad()
def compare(tokens: int, depth: int, method: str, bits: int) -> None:
    """One row of the table."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, depth).transpose(1, 2) for _ in range(3))
    known = choose_attention(SeenAttention("here", q, k, v), method, bits)
    torch._dynamo.reset()
    coded: Any = {"calibration": Calibration("by hand", 1, {}, attention={"": known})}
    fast, floats = torch.compile(in_kernel, backend="fxquant", options=coded), torch.compile(in_float, backend="fxquant")
    slow = torch.compile(as_specification, backend="fxquant", options=coded)
    with patch.object(log_attention, "conditions", lambda *given: iter([("", False)])):
        slow(q, k, v)
    for run, kernel in ((fast, "attention_log"), (slow, None), (floats, "attention")):
        run(q, k, v)
        assert fxquant.report(run).sites[0].kernel == kernel
    calls = (fast, slow, floats, scaled_dot_product_attention)
    times = [[spent(lambda call=call: call(q, k, v)) for call in calls] for _ in range(ROUNDS)]  # type: ignore[misc]
    low = [1e6 * sorted(column)[ROUNDS * 15 // 100] for column in zip(*times, strict=True)]
    to_slow, to_float = (statistics.median(row[i] / row[0] for row in times) for i in (1, 2))
    given = log_attention.arguments(4, known, known.tensors())
    sums = torch.ops.fxquant.attention_log_trace(q, k, v, None, False, None, *given)[4].shape[0]
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    cosines = [f"{cosine(fast(q, k, v), other.double()):.4f}" for other in (exact, slow(q, k, v))]
    times_us = [f"{low[0]:.0f}", f"{low[1]:.0f}", f"{to_slow:.1f}", f"{low[2]:.0f}", f"{to_float:.2f}", f"{low[3]:.0f}"]
    print("| " + " | ".join([f"{tokens}x{depth}", method, *times_us, str(sums), *cosines]) + " |", flush=True)


# Three functions: Dynamo keeps what it compiled by the code of a function.
def in_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention, coded."""
    return scaled_dot_product_attention(q, k, v)


def as_specification(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention, coded."""
    return scaled_dot_product_attention(q, k, v)


def in_float(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention, not coded."""
    return scaled_dot_product_attention(q, k, v)


if __name__ == "__main__":
    main()
