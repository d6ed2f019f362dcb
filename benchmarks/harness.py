"""Side by side in one process run: interleaved rounds, medians and spread, cosine to float, a table, a plot and JSON."""

import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
SETTLE_S = 0.05  # the thread pools of ONNX Runtime, OpenVINO and OpenMP are asleep by then
UNTIMED = 3
TIMED = 3
PEERS = ("nncf", "onnxruntime", "openvino", "torchao", "transformers")


@dataclass
class Row:
    """One runner: milliseconds of every round, and its agreement with the float model."""

    name: str
    cosine: float | None = None
    first_call_s: float | None = None
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return 1e3 * statistics.median(self.times)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        quarters = statistics.quantiles(self.times, n=4)
        return (quarters[2] - quarters[0]) / statistics.median(self.times)


def measure(calls: dict[str, Call], rounds: int, seconds: float = 60.0, settle: float = SETTLE_S) -> dict[str, Row]:
    """Interleaved rounds of every call; stops early after ``seconds``.

    Each turn starts with a pause and a few untimed calls: the idle threads of the runner before it keep spinning on the
    cores for a while, and would be charged to this one (``settle`` seconds; 0 where all calls share one pool).
    """
    rows = {name: Row(name) for name in calls}
    start = time.perf_counter()
    for done in range(rounds):
        for name, call in calls.items():
            time.sleep(settle)
            for _ in range(UNTIMED):
                call()
            rows[name].times += [_seconds(call) for _ in range(TIMED)]
        if time.perf_counter() - start > seconds and done > 4:
            break
    return rows


def _seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def cosine(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Mean token cosine, over the tokens that the mask keeps."""
    each = torch.cosine_similarity(a, b, dim=-1)
    return float((each if mask is None else each[mask.bool()]).mean())


def table(rows: list[Row], baseline: str) -> str:
    """A markdown table, with speed over the baseline."""
    base = next(row for row in rows if row.name == baseline).median
    lines = [
        "| runner | ms, median | spread | x " + baseline + " | cosine to float | first call, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.median):
        agreement = f"{row.cosine:.4f}" if row.cosine is not None else ""
        first = f"{row.first_call_s:.1f}" if row.first_call_s is not None else ""
        lines.append(f"| {row.name} | {row.median:.2f} | {row.spread:.0%} | {base / row.median:.2f} | {agreement} | {first} |")
    return "\n".join(lines)


def show(text: str) -> None:
    """Markdown as it is, and drawn after it on a terminal."""
    print(text)
    if sys.stdout.isatty():
        import rich
        from rich.markdown import Markdown

        rich.print(Markdown(text))


def plot(groups: dict[str, list[Row]], baseline: str, path: Path) -> None:
    """Bars of speed over the baseline, one group a batch shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(groups), figsize=(6 * len(groups), 5), squeeze=False)
    for axis, (title, rows) in zip(axes[0], groups.items(), strict=True):
        base = next(row for row in rows if row.name == baseline).median
        ordered = sorted(rows, key=lambda row: -row.median)
        colours = ["tab:orange" if row.name.startswith("fxquant") else "tab:blue" for row in ordered]
        bars = axis.barh([row.name for row in ordered], [base / row.median for row in ordered], color=colours)
        axis.bar_label(bars, fmt="%.2fx", padding=3)
        axis.axvline(1.0, color="grey", linewidth=0.8)
        axis.set_xlabel(f"speed over {baseline}")
        axis.set_title(title)
        axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine(isa: str) -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "fxquant instruction set": isa,
        "versions": {name: version for name in PEERS if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(path: Path, info: dict[str, Any], groups: dict[str, list[Row]]) -> None:
    """Every sample as JSON."""
    data = {"machine": info, "groups": {title: [asdict(row) for row in rows] for title, rows in groups.items()}}
    path.write_text(json.dumps(data, indent=1))
