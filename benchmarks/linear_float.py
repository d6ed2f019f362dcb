"""fxquant::linear_float against F.linear and oneDNN with a packed weight: ``python benchmarks/linear_float.py [--isa avx2]``.

Calls are interleaved in one process; the figure of a call is the 15th percentile of its times, for all sides alike.
"""

import argparse
import os
import subprocess
import sys
from functools import partial

import torch
from harness import Call, measure
from kernels import SHAPES, figures
from models import AVX2
from torch.nn.functional import linear

import fxquant.ops  # noqa: F401 - defines the operators
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import load_library
from fxquant.lowering.isa import available_isas

OWN, MKL, ONEDNN = "linear_float", "F.linear", "oneDNN, packed"


def main() -> None:
    """One line a shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch, oneDNN and MKL to AVX2 too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for one shape")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    torch.set_num_threads(options.threads)
    isa = options.isa or available_isas()[-1]
    load_library(isa=ISAS.index(isa))
    print(f"instruction set {isa}, {options.threads} threads; microseconds\n")
    print(f"| M x K x N | {OWN} | {MKL} | ratio | {ONEDNN} | ratio |\n|---|---|---|---|---|---|")
    for m, k, n in SHAPES:
        us = times(m, k, n, options.seconds)
        ratios = [us[other] / us[OWN] for other in (MKL, ONEDNN)]
        print(
            f"| {m}x{k}x{n} | {us[OWN]:.0f} | {us[MKL]:.0f} | {ratios[0]:.2f} | {us[ONEDNN]:.0f} | {ratios[1]:.2f} |",
            flush=True,
        )


@torch.no_grad()
def times(m: int, k: int, n: int, seconds: float) -> dict[str, float]:
    """Microseconds of the three on one shape."""
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    ahead = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    calls: dict[str, Call] = {
        OWN: partial(torch.ops.fxquant.linear_float.default, x, torch.ops.fxquant.pack_float(weight), bias, n),
        MKL: partial(linear, x, weight, bias),
        ONEDNN: partial(torch.ops.mkldnn._linear_pointwise.default, x, ahead, bias, "none", [], ""),
    }
    return {name: figures(row)[0] for name, row in measure(calls, rounds=2000, seconds=seconds, settle=0.0).items()}


if __name__ == "__main__":
    main()
