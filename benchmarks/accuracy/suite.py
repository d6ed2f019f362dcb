"""The cells of the table: float first, then every scheme and method, each row appended to a file as soon as it is there.

Only the product's own way leads to a figure: ``fxquant.calibrate`` and ``torch.compile(backend="fxquant")``. Code
generation is "ops", which has the kernels and the numbers of the default and starts in a second. The method "dynamic" is
no calibration: scales found at run time, weights rounded to nearest.
"""

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import fxquant
from accuracy.rows import Cell, Row, done, read, write
from accuracy.subject import Subject, is_weight_only
from fxquant.calibration.recipes import RECIPES
from fxquant.calibration.recipes.vit import VIT_RECIPES

SCHEMES = ("w8a8", "w6a6", "w4a16-g128", "w8a7", "w4a8", "w4a4")
DYNAMIC = "dynamic"
WITH_ATTENTION = "minmax, with attention"  # its operands coded too, as the methods for vision transformers do
# Methods that find nothing for a weight alone.
_RANGES = ("minmax", "ema", "percentile", "omse", "kl")
ACTIVATIONS_ONLY = (*_RANGES, "smoothquant", "fpq", WITH_ATTENTION, *(recipe.name for recipe in VIT_RECIPES))
FLOAT = "float32"


def main(arguments: Sequence[str] | None = None, subjects: "dict[str, Callable[[], Subject]] | None" = None) -> None:
    """Measure what is missing, then write the page and the plots from everything that there is."""
    from accuracy.memory import report_memory
    from accuracy.tables import publish

    subjects = subjects or every_subject()
    options = parse(arguments, list(subjects))
    if options.memory:
        report_memory(options.methods)
        return
    prepare()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    measure([subjects[name]() for name in options.models], options, path)
    print(publish([make() for make in subjects.values()], read(path), options.out))


def every_subject() -> dict[str, Callable[[], Subject]]:
    """Name → what makes it, the quick ones first."""
    from accuracy.minilm_sentences import MiniLM
    from accuracy.smollm import PerturbedSmolLM, SmolLM
    from accuracy.vision import FashionViT, ViTSmall

    return {each.name: each for each in (FashionViT, MiniLM, ViTSmall, SmolLM, PerturbedSmolLM)}


def parse(arguments: Sequence[str] | None, models: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python benchmarks/accuracy", description="Scores of quantized models beside float.")
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="NAME", help=", ".join(models))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), metavar="SCHEME", help=", ".join(SCHEMES))
    known = [DYNAMIC, *RECIPES, WITH_ATTENTION]
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of the draw of calibration data")
    parser.add_argument("--out", type=Path, default=Path("docs/accuracy"))
    parser.add_argument("--again", action="store_true", help="measure rows anew that are in the file already")
    parser.add_argument("--memory", action="store_true", help="only: peak of resident memory of a short and a long calibration")
    return parser.parse_args(arguments)


def prepare() -> None:
    """No warnings and bars of other libraries between the rows."""
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def cells(subject: Subject, schemes: Iterable[str], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """Float, then every cell that says something: what no seed reaches is there once, ranges mean nothing to ``a16``."""
    yield Cell(subject.name, FLOAT, "", 0)
    for scheme in filter(subject.takes, schemes):
        for method in methods:
            if not (is_weight_only(scheme) and method in ACTIVATIONS_ONLY):
                for seed in seeds[:1] if method == DYNAMIC else seeds:
                    yield Cell(subject.name, scheme, method, 0 if method == DYNAMIC else seed)


def measure(subjects: list[Subject], options: argparse.Namespace, path: Path) -> None:
    """Append the row of every cell that the file lacks; a cell or a model that fails is named and passed over."""
    ready = set() if options.again else done(read(path), {each.name: each.protocol for each in subjects})
    wanted = {
        each: [c for c in cells(each, options.schemes, options.methods, options.seeds) if c not in ready] for each in subjects
    }
    console = Console(stderr=True)
    look = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with torch.no_grad(), Progress(*look, console=console) as progress:
        task = progress.add_task("", total=sum(map(len, wanted.values())))
        for subject, missing in wanted.items():
            if missing:
                try:
                    measure_subject(subject, missing, path, progress, task)
                except (FileNotFoundError, ImportError) as error:
                    console.print(f"left out: {subject.name}: {error}", markup=False)
                    progress.advance(task, len(missing))


def measure_subject(subject: Subject, missing: list[Cell], path: Path, progress: Progress, task: Any) -> None:
    """One model: its float form is loaded once, its own outputs are what every row is compared with."""
    progress.update(task, description=f"{subject.name}: float outputs")
    model = subject.load()
    reference = subject.reference(model)
    for cell in missing:
        progress.update(task, description=str(cell))
        try:
            row = measure_cell(subject, model, reference, cell)
        except (fxquant.FxQuantError, torch._dynamo.exc.TorchDynamoException) as error:
            progress.console.print(f"no row: {cell}: {' '.join(str(error).split())[:300]}", markup=False)
            traceback.print_exc(limit=1, file=sys.stderr)
        else:
            write(path, row)
            progress.console.print(f"{cell}: {row.scores}", markup=False, highlight=False)
        progress.advance(task)


def measure_cell(subject: Subject, model: nn.Module, reference: Any, cell: Cell) -> Row:
    """Calibrate if the method says so, compile, score."""
    torch._dynamo.reset()
    start = time.perf_counter()
    call, calibrated = model, start
    if cell.scheme != FLOAT:
        calibration = None
        if cell.method != DYNAMIC:
            batches = subject.batches(cell.seed)
            attention = {"attention": "calibrated"} if cell.method == WITH_ATTENTION else {}
            method, options = cell.method.partition(",")[0], {**subject.options, **attention}
            calibration = fxquant.calibrate(model, batches, scheme=cell.scheme, method=method, options=options)
        calibrated = time.perf_counter()
        chosen = {**subject.options, "calibration": calibration, "scheme": cell.scheme, "codegen": "ops"}
        call = torch.compile(model, backend="fxquant", options=chosen)
    scores = subject.score(call, reference)
    seconds = {"calibration": calibrated - start, "scoring": time.perf_counter() - calibrated}
    return Row(cell, subject.protocol, scores, {} if cell.scheme == FLOAT else linears(call), seconds, fxquant.__version__)


def linears(compiled: Any) -> dict[str, int]:
    """How many linear sites became what: scheme, or "float"."""
    found: dict[str, int] = {}
    for site in fxquant.report(compiled).sites:
        if site.kind == "linear":
            name = str(site.scheme or "float")
            found[name] = found.get(name, 0) + 1
    return found
