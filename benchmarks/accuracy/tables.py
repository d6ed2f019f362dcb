"""The page docs/accuracy/README.md and its plots, from the rows."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from accuracy.rows import Cell, Row, of_model
from accuracy.subject import Column, Subject

FLOAT = "float32"
HEAD = """# Accuracy

What each scheme and method costs on real models, beside float in the same run. Written by `python benchmarks/accuracy`, which
appends every row to `rows.jsonl` and measures only what is missing; change nothing here by hand. `dynamic` finds activation
scales at run time and rounds weights to nearest; every other method is one of `fxquant.calibrate`. Calibration data are never
scored (`benchmarks/accuracy/data.py`). "static" counts the linears whose activations have codes from the calibration: fxquant
leaves a linear dynamic where it predicts that static codes cost 0.5 dB more noise. With several seeds a figure is the mean ±
the standard deviation over draws of the calibration data.
"""


def publish(subjects: Sequence[Subject], rows: Mapping[Cell, Row], folder: Path) -> str:
    """Write the page and a plot for each model that has rows by the protocol that holds now; returns the page."""
    parts = [HEAD]
    for subject in subjects:
        own = [row for row in of_model(rows.values(), subject.name) if row.protocol == subject.protocol]
        if own:
            parts.append(section(subject, own))
            if plot(subject, own, folder / f"{subject.name.replace(' ', '-')}.svg"):
                parts.append(f"![{subject.damage[1]}]({subject.name.replace(' ', '-')}.svg)\n")
    page = "\n".join(parts)
    (folder / "README.md").write_text(page)
    return page


def section(subject: Subject, rows: list[Row]) -> str:
    """One model's protocol and table."""
    titles = ["scheme", "method", "seeds", "linears quantized", "static", *(column.title for column in subject.columns)]
    lines = [f"## {subject.title}", "", subject.protocol, "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    exact = next((row for row in rows if row.cell.scheme == FLOAT), None)
    for (scheme, method), group in grouped(rows):
        count, static = linears(group)
        figures = [figure(column, group, exact) for column in subject.columns]
        seeds = "" if scheme == FLOAT else str(len(group))
        lines.append(f"| {' | '.join([scheme, method, seeds, count, static, *figures])} |")
    return "\n".join(lines) + "\n"


def grouped(rows: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    """Rows that differ in the seed alone, float first, then by widths of weights and activations, and by method."""

    def place(row: Row) -> tuple[bool, list[int], str, bool, str]:
        cell = row.cell
        digits = [int(part) for part in "".join(c if c.isdigit() else " " for c in cell.scheme).split()]
        return cell.scheme != FLOAT, [-width for width in digits[:2]], cell.scheme, cell.method != "dynamic", cell.method

    ordered = sorted(rows, key=place)
    return [(key, list(group)) for key, group in groupby(ordered, key=lambda row: (row.cell.scheme, row.cell.method))]


def linears(rows: list[Row]) -> tuple[str, str]:
    """(quantized of all, static) linears; of several seeds the fewest."""
    if not rows[0].linears:
        return "", ""
    total = sum(rows[0].linears.values())
    quantized = min(total - row.linears.get("float", 0) for row in rows)
    static = min(sum(n for name, n in row.linears.items() if name.endswith("static")) for row in rows)
    return f"{quantized} of {total}", str(static)


def figure(column: Column, rows: list[Row], exact: Row | None) -> str:
    """A score, or its ratio to float's, as mean and deviation over seeds; empty where it cannot be told."""
    values = [score(column, row, exact) for row in rows]
    if any(math.isnan(value) for value in values):
        return "" if column.ratio_of and exact is None else "nan"
    mean = format(statistics.fmean(values), column.form)
    return f"{mean} ± {format(statistics.stdev(values), column.form)}" if len(values) > 1 else mean


def score(column: Column, row: Row, exact: Row | None) -> float:
    """A row's value in a column."""
    if column.ratio_of is None:
        return row.scores.get(column.key, math.nan)
    return row.scores.get(column.ratio_of, math.nan) / exact.scores[column.ratio_of] if exact else math.nan


def plot(subject: Subject, rows: list[Row], path: Path) -> bool:
    """Damage by scheme, a mark a method and seed, on a logarithmic axis; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = subject.name  # the same file for the same rows
    from matplotlib import pyplot

    key, title, damage = subject.damage
    groups = [(names, group) for names, group in grouped(rows) if names[0] != FLOAT]
    if not groups:
        return False
    schemes = list(dict.fromkeys(scheme for (scheme, _), _ in groups))
    methods = sorted({method for (_, method), _ in groups}, key=lambda method: (method != "dynamic", method))
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    for i, method in enumerate(methods):
        points = [(schemes.index(s), row) for (s, m), group in groups if m == method for row in group]
        shift = 0.6 * ((i + 0.5) / len(methods) - 0.5)
        axis.plot([x + shift for x, _ in points], [max(damage(r.scores[key]), 1e-7) for _, r in points], "o", label=method)
    axis.set_xticks(range(len(schemes)), schemes)
    axis.set_yscale("log")
    axis.set_ylabel(title)
    axis.set_title(subject.title)
    axis.grid(axis="y", which="both", linewidth=0.3)
    axis.legend(ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
