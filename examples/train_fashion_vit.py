"""Train a small vision transformer on Fashion-MNIST from nothing, then quantize it: ``python examples/train_fashion_vit.py``.

About ten minutes of one core; 89 % of the test pictures come out right. ``--short`` takes sixty steps and some seconds, enough
to see that it learns. The weights go to ``.cache/`` (``--out``), where ``benchmarks/accuracy`` looks for them. The seed is
fixed: the order of the pictures, the flips and the first weights are the same every time, the last digits of a weight depend
on the threads that sum it.

The model is a pre-norm ViT with a class token. Its patch embedding is three strided convolutions instead of one, which learns
much faster from this little data (Xiao et al., "Early convolutions help transformers see better", 2021). It has no outlier
channels worth the name: an easy case for a quantizer down to 6 bits.
"""

import argparse
import gzip
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import fxquant

PACKAGE = "dataset-fashion-mnist"
WEIGHTS = Path(__file__).parents[1] / ".cache" / "fashion_vit.safetensors"
MEAN, STD = 0.2860, 0.3530  # of all training pictures
CLASSES = 10
BATCH = 128
EPOCHS, SHORT_STEPS, SHORT_TEST = 6, 60, 1000
RATE, DECAY, WARM_UP = 1.5e-3, 0.05, 0.1
CALIBRATION = 512  # training pictures


class Attention(nn.Module):
    """Self-attention of [b, t, width], the heads side by side in three linears."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value))
        out: Tensor = self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return out


class FashionViT(nn.Module):
    """Pictures [b, 1, 28, 28] → logits [b, 10], by 16 patches and a class token."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 4, 3, stride=2, padding=1),  # [b, 32, 14, 14]
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),  # [b, 64, 7, 7]
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),  # [b, 128, 4, 4]
        )
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.stem(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(patches), -1, -1), patches], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def main() -> None:
    """Train, test, save, quantize; says what is missing where the pictures are not installed."""
    parser = argparse.ArgumentParser(description="Train a small ViT on Fashion-MNIST and quantize it.")
    parser.add_argument("--short", action="store_true", help=f"{SHORT_STEPS} steps, and no file unless --out names one")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, help=f"file of the weights (default: {WEIGHTS})")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    console = Console(highlight=False)
    pictures, labels = load_or_exit("train")
    model = train(pictures, labels, SHORT_STEPS if options.short else options.epochs * len(labels) // BATCH, console)
    out = options.out or (None if options.short else WEIGHTS)
    if out is not None:
        save(model, out)
        console.print(f"written: {out}")
    count = SHORT_TEST if options.short else None
    tested, answers = (each[:count] for each in load_or_exit("t10k"))
    show(model, pictures[-CALIBRATION:], tested, answers, console)


def load_or_exit(split: str) -> tuple[Tensor, Tensor]:
    """The pictures and labels of a split; ends the program where the package is not installed."""
    try:
        return load_pictures(split)
    except FileNotFoundError as error:
        sys.exit(str(error))


def load_pictures(split: str) -> tuple[Tensor, Tensor]:
    """Normalized pictures float32 [n, 1, 28, 28] and labels int64 [n] of "train" (60,000) or "t10k" (10,000).

    Raises:
        FileNotFoundError: the package with the data is not installed.
    """
    listed = subprocess.run(["dpkg", "-L", PACKAGE], capture_output=True, text=True, check=False).stdout.split("\n")
    paths = sorted(path for path in listed if path.endswith("ubyte.gz") and split in path)
    if len(paths) != 2:
        raise FileNotFoundError(f"The data are missing: apt-get install {PACKAGE}")
    images, labels = (numpy.frombuffer(gzip.decompress(Path(path).read_bytes()), numpy.uint8) for path in paths)
    pixels = torch.from_numpy(images[16:].copy()).view(-1, 1, 28, 28) / 255
    return (pixels - MEAN) / STD, torch.from_numpy(labels[8:].copy()).long()


def train(pictures: Tensor, labels: Tensor, steps: int, console: Console, seed: int = 0) -> FashionViT:
    """A model trained for that many steps of AdamW: warm-up, then a cosine, with horizontal flips."""
    torch.manual_seed(seed)
    model = FashionViT()
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=WARM_UP)
    start, seen = time.perf_counter(), batches(pictures, labels, steps)
    with Progress(console=console, transient=True) as progress:
        for x, y in progress.track(seen, total=steps, description="training"):
            loss = cross_entropy(model(x), y, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    console.print(f"trained {steps} steps of {BATCH} pictures in {time.perf_counter() - start:.0f} s, last loss {loss:.3f}")
    return model.eval()


def batches(pictures: Tensor, labels: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, half of the pictures flipped, pass after pass."""
    order = torch.randperm(len(labels))
    for step in range(steps):
        first = step * BATCH % (len(labels) - BATCH + 1)
        if first < BATCH:
            order = torch.randperm(len(labels))
        chosen = order[first : first + BATCH]
        x = pictures[chosen]
        flips = torch.rand(len(x), 1, 1, 1) < 0.5
        yield torch.where(flips, x.flip(-1), x), labels[chosen]


def save(model: FashionViT, path: Path) -> None:
    """Write the weights as one safetensors file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), str(path))


def load(path: Path = WEIGHTS) -> FashionViT:
    """The trained model.

    Raises:
        FileNotFoundError: nobody trained it yet.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: python examples/train_fashion_vit.py")
    model = FashionViT()
    model.load_state_dict(load_file(str(path)))
    return model.eval()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Any], pictures: Tensor, labels: Tensor) -> float:
    """Fraction of right answers; the last batch may be shorter."""
    right = [model(x).argmax(-1) == y for x, y in zip(pictures.split(500), labels.split(500), strict=True)]
    return float(torch.cat(right).float().mean())


def show(model: FashionViT, calibration: Tensor, pictures: Tensor, labels: Tensor, console: Console) -> None:
    """Accuracy of the float model and of its quantized forms on pictures that neither training nor calibration saw."""
    console.print(f"accuracy on {len(labels)} test pictures:")
    console.print(f"  float          {accuracy(model, pictures, labels):.2%}")
    for scheme in ("w8a8", "w4a4"):
        seen = fxquant.calibrate(model, calibration.split(128), scheme=scheme)
        options: dict[str, Any] = {"scheme": scheme, "calibration": seen, "codegen": "ops"}
        fast = torch.compile(model, backend="fxquant", options=options)
        console.print(f"  {scheme} static    {accuracy(fast, pictures, labels):.2%}")
    console.print(fxquant.report(fast).to_text().partition("\n\n")[0], soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
