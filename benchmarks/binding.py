"""What it costs to look at the weights of a call: ``python benchmarks/binding.py``, microseconds for 37 weights."""

import statistics
import timeit

import torch

from fxquant.binding import Binder, FrozenValue, Packed, Program, Slot
from fxquant.schemes import SCHEMES

WEIGHTS = 37  # the linears of MiniLM
CALLS = 20_000


def main() -> None:
    """Print the median of seven runs: the whole call of a program that does nothing."""
    weights = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(WEIGHTS)]
    slots = tuple(
        Slot(str(i), FrozenValue((i,), lambda value: value), SCHEMES["w8a8"], lambda w, s: Packed(torch.zeros(4)))
        for i in range(WEIGHTS)
    )
    binder = Binder(Program(lambda *args: None, slots, (WEIGHTS,)), lambda reasons: None, lambda *args: None)  # type: ignore[arg-type,return-value]
    args = (*weights, torch.zeros(1))
    binder(args)
    spent = [timeit.timeit(lambda: binder(args), number=CALLS) / CALLS for _ in range(7)]
    print(f"{1e6 * statistics.median(spent):.1f} us a call for {WEIGHTS} weights")


if __name__ == "__main__":
    main()
