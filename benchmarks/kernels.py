"""One linear, dynamic quantization included, against F.linear: ``python benchmarks/kernels.py [--isa avx2]``."""

import argparse
import os
import subprocess
import sys

import torch
from harness import measure
from minilm import AVX2
from torch.nn.functional import linear

import fxquant.ops
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import load_library
from fxquant.lowering.isa import available_isas
from fxquant.lowering.pack import pack_linear
from fxquant.schemes import SCHEMES

SHAPES = (
    (128, 384, 1536),
    (128, 1536, 384),
    (128, 384, 384),
    (1024, 384, 1536),
    (197, 768, 3072),
    (16, 768, 3072),
    (1, 768, 3072),
)


def main() -> None:
    """A table of ratios for every shape, scheme and instruction set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch, oneDNN and MKL to AVX2 too")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    isas = ["avx2"] if options.isa else [isa for isa in available_isas() if isa != "scalar"]
    print(f"torch capability {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print("| M x K x N | scheme | instruction set | us | F.linear, us | ratio | GOP/s |\n|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        compare(shape, isas)


def compare(shape: tuple[int, int, int], isas: list[str]) -> None:
    """All schemes on one shape."""
    m, k, n = shape
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    for isa in isas:
        load_library(isa=ISAS.index(isa))
        calls = {"float": lambda: linear(x, weight, bias)}
        for name, scheme in SCHEMES.items():
            packed = pack_linear(weight, scheme)
            bits = (scheme.weight_bits, scheme.act_bits)
            calls[name] = lambda p=packed, b=bits: fxquant.ops.torch.ops.fxquant.linear_dynamic(x, p, bias, n, *b)  # type: ignore[misc]
        rows = measure(calls, rounds=300, seconds=6)
        base = rows["float"].median * 1e3
        for name in SCHEMES:
            spent = rows[name].median * 1e3
            gops = 2 * m * k * n / spent / 1e3
            print(f"| {m}x{k}x{n} | {name} | {isa} | {spent:.0f} | {base:.0f} | {base / spent:.2f} | {gops:.0f} |", flush=True)


if __name__ == "__main__":
    main()
