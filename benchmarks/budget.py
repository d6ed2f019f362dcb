"""Budgets on two real models: ``python benchmarks/budget.py [--isa avx2] [--models NAME ...] [--out FOLDER] [--time-again]``.

Ten budgets a model, each on calibration data of its own seed. A plan is compiled by Inductor and judged on text that no
search saw (Luke; calibrated on John). It is then timed against the fastest plan of one scheme for all linears whose error
on that text is at most its own, interleaved in this process, and against float through Inductor.

A scheme's bits in all say how fast it is on AVX2, so the fastest uniform plan is that of the fewest; among equals that of the
least error. ``--time-again`` reads the plans of an earlier run and only measures times.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models import AVX2

UNIFORM = ("w8a8", "w8a7", "w7a8", "w7a7", "w6a8", "w8a6", "w7a6", "w6a7", "w6a6", "w5a7", "w4a8")
FLOAT = "float"
CALIBRATION, UNSEEN = 12, 16  # batches
TOKENS = 128
MINILM = (
    {"cosine": 0.99}, {"cosine": 0.99}, {"cosine": 0.99}, {"cosine": 0.995}, {"cosine": 0.995},
    {"cosine": 0.997}, {"sqnr_db": 17.0}, {"sqnr_db": 20.0}, {"sqnr_db": 23.0}, {"metric": "sentence", "most": 0.002},
)  # fmt: skip
SMOLLM = (
    {"kl": 0.05}, {"kl": 0.05}, {"kl": 0.03}, {"kl": 0.1}, {"cosine": 0.99},
    {"cosine": 0.99}, {"cosine": 0.995}, {"sqnr_db": 20.0}, {"sqnr_db": 23.0}, {"metric": "first choice", "most": 0.15},
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model with batches of one shape: ``calibration`` of a seed, and unseen ones of which the first is timed."""

    title: str
    load: Callable[[], Any]
    calibration: Callable[[int], list[Any]]
    unseen: Callable[[], list[Any]]
    budgets: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One budget: its plan, errors on unseen text, and the ratio of times in every round (other over plan)."""

    model: str
    budget: dict[str, Any]
    seed: int
    search_s: float
    schemes: dict[str, str]
    limit: float
    error: float
    uniform: str
    uniform_error: float
    plan_ms: float = 0.0
    over_uniform: list[float] = field(default_factory=list)
    over_float: list[float] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        """Whether the error on unseen text keeps the budget."""
        return self.error <= self.limit


def minilm_subject() -> Subject:
    """MiniLM-L6 on pieces of running text, 1 x 128 tokens."""
    import minilm
    from accuracy.data import JOHN, disjoint, draw

    john, luke = (pieces(minilm.verses(keys), minilm.CHARACTERS) for keys in (minilm.JOHN, minilm.LUKE))
    split = disjoint(calibration=john, scored=luke[:UNSEEN])

    def rows(texts: Sequence[str]) -> list[Any]:
        return [minilm.tokens(text, 1, TOKENS) for text in texts]

    assert JOHN == minilm.JOHN
    return Subject(
        f"MiniLM, 1 x {TOKENS} tokens",
        minilm.load,
        lambda seed: rows(draw(split.calibration, CALIBRATION, seed)),
        lambda: rows(split.scored),
        MINILM,
    )


def smollm_subject() -> Subject:
    """SmolLM2-135M-Instruct, prefill of windows of 128 tokens, the first of which is BOS."""
    from accuracy.data import JOHN, LUKE_1_TO_3, disjoint, draw, verses
    from accuracy.smollm import SmolLM

    model = SmolLM()
    split = disjoint(calibration=verses(JOHN), scored=verses(LUKE_1_TO_3))

    def windows(texts: Sequence[str]) -> list[Any]:
        return [row[None] for row in model._windows(list(texts), TOKENS - 1)]

    return Subject(
        f"SmolLM2-135M, 1 x {TOKENS} tokens",
        model.load,
        lambda seed: draw(windows(split.calibration), CALIBRATION, seed),
        lambda: windows(split.scored)[:UNSEEN],
        SMOLLM,
        model.options,
    )


SUBJECTS = {"minilm": minilm_subject, "smollm2": smollm_subject}


def pieces(text: str, size: int) -> list[str]:
    """A text in pieces of ``size`` characters."""
    return [text[i : i + size] for i in range(0, len(text) - size, size)]


def sentence_error(wanted: Any, got: Any) -> float:
    """1 - cosine of the mean of all tokens."""
    import torch

    return 1 - float(torch.cosine_similarity(wanted[0].double().mean(1), got[0].double().mean(1)).mean())


def choice_error(wanted: Any, got: Any) -> float:
    """The share of tokens after which another next token is the most likely."""
    return float((wanted.argmax(-1) != got.argmax(-1)).double().mean())


METRICS: dict[str, Callable[[Any, Any], float]] = {"sentence": sentence_error, "first choice": choice_error}


def budget_of(values: Mapping[str, Any]) -> Any:
    """The budget of a row of the table above."""
    import fxquant

    return fxquant.Budget(**{**values, **({"metric": METRICS[values["metric"]]} if "metric" in values else {})})


def main() -> None:
    """Measure, print the table, write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch, oneDNN and MKL to AVX2 too")
    parser.add_argument(
        "--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="NAME", help=", ".join(SUBJECTS)
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--runs", type=int, nargs="+", default=list(range(10)), metavar="N", help="only these budgets, 0 to 9")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="with --threads 1: CPU time, which a busy machine hardly changes"
    )
    parser.add_argument("--time-again", action="store_true", help="only time the plans of the file in --out")
    parser.add_argument("--no-times", action="store_true", help="only search and judge; --time-again does the rest")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    from models import prepare, with_no_grad

    prepare(options)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time needs --threads 1: several threads that wait for one another spend CPU time too")
    with_no_grad(measure_all, options)


def measure_all(options: argparse.Namespace) -> None:
    """Every model, one after another; the file is written anew after each budget."""
    from harness import machine, show

    from fxquant.lowering.isa import current_isa

    info = machine(current_isa())
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"budget-{info['fxquant instruction set']}.json"
    known = [Run(**values) for values in json.loads(path.read_text())["runs"]] if path.is_file() else []
    for name in options.models:
        for run in runs_of(name, known, options):
            known = [other for other in known if (other.model, other.seed) != (run.model, run.seed)] + [run]
            known.sort(key=lambda each: (list(SUBJECTS).index(each.model), each.seed))
            info |= {"load": os.getloadavg(), "clock": "CPU time" if options.cpu_time else "wall"}
            path.write_text(json.dumps({"machine": info, "runs": [asdict(each) for each in known]}, indent=1))
    print(", ".join(f"{key}: {value}" for key, value in info.items()))
    for name in options.models:
        show(f"\n{name}\n\n{table([run for run in known if run.model == name])}")
    print(f"\nwritten: {path}")


def runs_of(name: str, known: Sequence[Run], options: argparse.Namespace) -> Iterator[Run]:
    """The runs of one model, each as soon as it is done."""
    subject = SUBJECTS[name]()
    model, unseen = subject.load(), subject.unseen()
    if options.time_again:
        for run in known:
            if run.model == name and run.seed in options.runs:
                time_plan(run, subject, model, unseen[0], options)
                print(line(run), file=sys.stderr)
                yield run
        return
    wanted = [model(*given[0], **given[1]) for given in map(arguments, unseen)]
    errors = uniform_errors(subject, model, unseen, wanted)
    for seed in options.runs:
        run = search(name, subject, model, seed, unseen, wanted, errors)
        if not options.no_times:
            time_plan(run, subject, model, unseen[0], options)
        print(line(run), file=sys.stderr)
        yield run


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a batch."""
    return ((), batch) if isinstance(batch, dict) else ((batch,), {})


def uniform_errors(subject: Subject, model: Any, unseen: Sequence[Any], wanted: Sequence[Any]) -> dict[str, list[float]]:
    """Scheme → the error of that scheme for all, by the measure of every budget; code is not generated for it."""
    import torch

    found = {}
    for scheme in UNIFORM:
        torch._dynamo.reset()  # past a few variants Dynamo runs the model as it is
        call = compiled(model, {**subject.options, "scheme": scheme, "codegen": "ops"})
        found[scheme] = mean_errors(call, subject, unseen, wanted)
        print(f"{scheme} for all: {', '.join(f'{error:.5f}' for error in found[scheme])}", file=sys.stderr)
    return found


def mean_errors(call: Any, subject: Subject, unseen: Sequence[Any], wanted: Sequence[Any]) -> list[float]:
    """The mean error over unseen batches, by the measure of every budget."""
    budgets = [budget_of(values) for values in subject.budgets]
    kinds = [tuple(sorted(values.keys() - {"most"})) for values in subject.budgets]
    sums: Counter[tuple[str, ...]] = Counter()
    for batch, y in zip(unseen, wanted, strict=True):
        args, keywords = arguments(batch)
        got = call(*args, **keywords)
        for kind in dict.fromkeys(kinds):
            sums[kind] += budgets[kinds.index(kind)].error(y, got)
    return [sums[kind] / len(unseen) for kind in kinds]


def compiled(model: Any, options: Mapping[str, Any] | None) -> Any:
    """The model by fxquant with these options, or (None) by Inductor alone."""
    import torch

    return torch.compile(model) if options is None else torch.compile(model, backend="fxquant", options=dict(options))


def search(
    name: str, subject: Subject, model: Any, seed: int, unseen: list[Any], wanted: list[Any], errors: dict[str, list[float]]
) -> Run:
    """The plan of one budget, judged on unseen text as Inductor compiles it, with the uniform plan to beat."""
    import torch

    import fxquant

    torch._dynamo.reset()
    values = dict(subject.budgets[seed])
    budget = budget_of(values)
    start = time.perf_counter()
    calibration = fxquant.calibrate(model, subject.calibration(seed), budget=budget, options=dict(subject.options))
    seconds = time.perf_counter() - start
    assert calibration.plan is not None
    call = compiled(model, {**subject.options, "calibration": calibration})
    error = mean_errors(call, subject, unseen, wanted)[seed]
    as_good = {scheme: found[seed] for scheme, found in errors.items() if found[seed] <= error}
    uniform = min(as_good, key=lambda scheme: (bits(scheme), as_good[scheme]), default=FLOAT)
    schemes = dict(calibration.plan.schemes)
    return Run(name, values, seed, seconds, schemes, budget.limit, error, uniform, as_good.get(uniform, 0.0))


def bits(scheme: str) -> int:
    """Of weights and activations together."""
    return int(scheme[1]) + int(scheme[3])


def time_plan(run: Run, subject: Subject, model: Any, batch: Any, options: argparse.Namespace) -> None:
    """Rounds of all sides, interleaved; a side's figure of a round is the least of three calls."""
    import torch

    torch._dynamo.reset()
    plan = {**subject.options, "sites": {**subject.options.get("sites", {}), **run.schemes}}
    sides: dict[str, Any] = {"plan": plan, FLOAT: None}
    if run.uniform != FLOAT:
        sides["uniform"] = {**subject.options, "scheme": run.uniform}
    args, keywords = arguments(batch)
    calls = {name: bound(compiled(model, side), args, keywords) for name, side in sides.items()}
    least: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            call()
            least[name].append(min(seconds(call, options.cpu_time) for _ in range(3)))
    run.plan_ms = 1e3 * statistics.median(least["plan"])
    run.over_float = [other / own for other, own in zip(least[FLOAT], least["plan"], strict=True)]
    run.over_uniform = [other / own for other, own in zip(least.get("uniform", least[FLOAT]), least["plan"], strict=True)]


def seconds(call: Callable[[], Any], cpu_time: bool) -> float:
    """Of one call, by the clock or by the CPU time of this process."""
    clock = time.process_time if cpu_time else time.perf_counter
    start = clock()
    call()
    return clock() - start


def bound(call: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Callable[[], Any]:
    """A call with its arguments, made once so that it is compiled."""
    call(*args, **keywords)
    return lambda: call(*args, **keywords)


def line(run: Run) -> str:
    """One row of the table."""
    wish = ", ".join(f"{key} {value}" for key, value in run.budget.items())
    counts = Counter(run.schemes.values()).most_common()
    plan = ", ".join(f"{count} {scheme}" for scheme, count in counts)
    uniform = f"{run.uniform} ({run.uniform_error:.5f})" if run.uniform != FLOAT else "none: float"
    return (
        f"| {wish} | {run.seed} | {run.search_s:.0f} | {run.limit:.5f} | {run.error:.5f} | {'yes' if run.is_kept else 'NO'} "
        f"| {plan} | {uniform} | {run.plan_ms:.1f} | {spread(run.over_uniform)} | {spread(run.over_float)} |"
    )


def spread(ratios: Sequence[float]) -> str:
    """The median of ratios and their quartiles."""
    if not ratios:
        return ""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def table(runs: Sequence[Run]) -> str:
    """A markdown table, and in how many runs the budget was kept."""
    head = (
        "| budget | seed | search, s | error allowed | on unseen text | kept | plan | fastest uniform of at most this error "
        "| plan, ms | x uniform (quartiles) | x float, Inductor |"
    )
    kept = f"\nkept in {sum(run.is_kept for run in runs)} of {len(runs)} runs"
    return "\n".join([head, "|---" * 11 + "|", *map(line, runs), kept])


if __name__ == "__main__":
    main()
