"""Row programs on and off: ``python benchmarks/chains.py [--isa avx2]``, on MiniLM's weights and on a gated feed-forward.

Calls are interleaved. The figure of a call is the 15th percentile of its times, for all sides alike. ``share`` is the
share of the peak of vpmaddubsw with vpaddw (w8a8: vpmaddwd with vpaddd; torch: fused multiply-add), which peak.cpp measures
first: on a busy machine that comes out too low.
With ``--threads 1`` the time is that of the process, which others on the machine do not take from.
"""

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from kernels import peaks
from minilm import held_out, load
from models import AVX2
from torch import nn

TIMED = 3
ROWS = (1, 16, 128, 197, 1024)


class Gated(nn.Module):
    """Llama's feed-forward, with normal weights: those of trained layers are close to normal, fresh ones are uniform."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


@torch.no_grad()
def main() -> None:
    """Print microseconds and ratios."""
    options = parse()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    top = peaks(options.threads)
    print(f"peaks, GOP/s, {options.threads} threads: " + ", ".join(f"{name} {value:.0f}" for name, value in top.items()))
    model = load()
    layer = model.encoder.layer[3]
    forward = nn.Sequential(layer.intermediate.dense, nn.GELU(), layer.output.dense)
    for rows in options.rows:
        compare(f"feed-forward {rows}x384x1536", forward, (torch.randn(rows, 384),), {}, options, top)
    for rows in options.rows:
        compare(f"gated {rows}x576x1536", Gated(576, 1536).eval(), (torch.randn(rows, 576),), {}, options, top)
    if options.model:
        compare("MiniLM, 1 x 128 tokens", model, (), held_out(1, 128), options, None)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each table")
    parser.add_argument("--schemes", nargs="+", default=["w8a7", "w6a6"])
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", action="store_true", help="the whole of MiniLM too")
    return parser.parse_args()


def compare(
    title: str,
    model: nn.Module,
    args: tuple[torch.Tensor, ...],
    inputs: object,
    options: argparse.Namespace,
    top: dict[str, float] | None,
) -> None:
    """Eager, and fxquant with and without chains."""
    given = dict(inputs)  # type: ignore[call-overload]
    torch._dynamo.reset()
    made: dict[str, Callable[..., object]] = {"torch": model}
    for scheme in options.schemes:
        for chains in (False, True):
            settings = {"scheme": scheme, "chains": chains}
            compiled = torch.compile(model, backend="fxquant", options=settings, dynamic=False)
            made[f"{scheme}, chains {'on' if chains else 'off'}"] = compiled  # type: ignore[assignment]
    times = measure({name: (lambda run=run: run(*args, **given)) for name, run in made.items()}, options)
    base = low(times["torch"])
    products = 2 * args[0].shape[0] * sum(p.numel() for p in model.parameters() if p.dim() == 2) if args else 0
    print(f"\n{title}\n\n| runner | us | x torch | GOP/s | share |\n|---|---|---|---|---|")
    for name, row in times.items():
        rate = products / low(row) / 1e9
        share = (
            "" if top is None or name == "torch" else f"{rate / top['maddwd' if name.startswith('w8a8') else 'maddubs']:.0%}"
        )
        print(f"| {name} | {1e6 * low(row):.0f} | {base / low(row):.2f} | {rate:.0f} | {share} |", flush=True)


def measure(calls: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every call, interleaved."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5 * TIMED:
        for name, call in calls.items():
            call()
            for _ in range(TIMED):
                begin = clock()
                call()
                times[name].append(clock() - begin)
    return times


def low(times: list[float]) -> float:
    """The 15th percentile."""
    return sorted(times)[len(times) * 15 // 100]


if __name__ == "__main__":
    main()
