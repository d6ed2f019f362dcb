"""Softmax over the last dimension: ``python benchmarks/softmax.py [--isa avx2] [--threads 1] [--quick] [--lengths]``.

torch.softmax with ``out=`` and our three forms write into the same tensor, and a plain copy of the input, which reads and
writes each element once, stands beside them: the last column says which part of the copy's bandwidth a form reaches,
counting one read and one write of every element. Calls are interleaved; a figure is the 15th percentile of its times.

``--lengths`` is what lowering/schedule.py is made from: compiled graphs with Inductor's own code against compiled graphs that
call our operator, by length of the row and size of the tensor; a softmax alone, and one that reads x·s + mask. All allocate
their result.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from harness import Call, measure
from kernels import figures
from models import AVX2

from fxquant.config import ISAS
from fxquant.lowering.cpu.build import load_library
from fxquant.lowering.isa import current_isa
from fxquant.ops import BLOCKED, THREE_PASS, TWO_PASS

SHAPES = ((8, 1 << 22), (1024, 32768), (256, 4096), (1024, 128))
LENGTHS = tuple(1 << bits for bits in range(7, 23))
ELEMENTS = (1 << 14, 1 << 17, 1 << 22)  # of each tensor of --lengths, and at least two rows
FORMS = {"three-pass": THREE_PASS, "two-pass": TWO_PASS, "blocked": BLOCKED, "chosen": -1}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch to AVX2 too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="half a second a shape")
    parser.add_argument("--lengths", action="store_true", help="our operator against Inductor's code by length of the row")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    torch.set_num_threads(options.threads)
    isa = current_isa()
    load_library(isa=ISAS.index(isa))
    print(f"torch capability {torch.backends.cpu.get_cpu_capability()}, fxquant {isa}, {options.threads} threads\n")
    seconds = 0.5 if options.quick else 8.0
    if options.lengths:
        print(
            "| rows x elements | reads | Inductor, us | median | fxquant, us | median | ratio |\n|---|---|---|---|---|---|---|"
        )
        for elements, n in product(ELEMENTS, LENGTHS):
            if 2 * n <= elements:
                against_inductor((elements // n, n), seconds / 4)
        return
    print("| rows x elements | form | us | median | x torch.softmax(out=) | x three-pass | GB/s | of the copy's |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        compare(shape, seconds)


@torch.no_grad()
def compare(shape: tuple[int, int], seconds: float) -> None:
    """All forms on one shape."""
    x = torch.randn(shape)
    out = torch.empty_like(x)
    calls: dict[str, Call] = {"torch out=": partial(torch.softmax, x, -1, out=out), "copy": partial(out.copy_, x)}
    for name, form in FORMS.items():
        calls[name] = partial(torch.ops.fxquant.softmax_into.default, x, False, form, out)
    rows = {name: figures(row) for name, row in measure(calls, rounds=2000, seconds=seconds).items()}
    moved = 2 * x.numel() * x.element_size()
    for name, (spent, busy) in rows.items():
        print(
            f"| {shape[0]}x{shape[1]} | {name} | {spent:.1f} | {busy:.2f} | {rows['torch out='][0] / spent:.2f} "
            f"| {rows['three-pass'][0] / spent:.2f} | {moved / spent / 1e3:.1f} | {rows['copy'][0] / spent:.2f} |",
            flush=True,
        )


@torch.no_grad()
def against_inductor(shape: tuple[int, int], seconds: float) -> None:
    """Both rows of --lengths for one shape."""
    x, mask = torch.randn(shape), torch.zeros(shape[1])
    reads: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"x": lambda x: x, "x*s + mask": lambda x: x * 0.125 + mask}
    for name, read in reads.items():
        torch.compiler.reset()
        sides = {
            "inductor": lambda x, read=read: torch.softmax(read(x), -1),
            "fxquant": lambda x, read=read: torch.ops.fxquant.softmax.default(read(x), -1, False),
        }
        calls: dict[str, Call] = {side: partial(torch.compile(f, dynamic=False), x) for side, f in sides.items()}
        rows = measure(calls, 2000, seconds, settle=0.0)
        (theirs, busy), (spent, own_busy) = figures(rows["inductor"]), figures(rows["fxquant"])
        times = f"{theirs:.0f} | {busy:.2f} | {spent:.0f} | {own_busy:.2f} | {theirs / spent:.2f}"
        print(f"| {shape[0]}x{shape[1]} | {name} | {times} |", flush=True)


if __name__ == "__main__":
    main()
