"""The report: what fired, what was refused and why, for every graph of a model."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from fxquant.reporting.record import GraphRecord, RewriteRow, SiteRow

SCHEMA = "fxquant.report"
VERSION = 1
# Field of a site → column: microseconds by the measured table, shown where there is one.
TIMES = {"float_us": "float us", "own_float_us": "own float us", "scheme_us": "scheme us"}


@dataclass(frozen=True)
class Report:
    """Printable record of one or more graphs. ``print`` gives text, ``to_json`` everything."""

    graphs: tuple[GraphRecord, ...]

    @property
    def sites(self) -> tuple[SiteRow, ...]:
        """Every candidate site of every graph; a site of a recompiled graph counts once."""
        found: dict[tuple[str, str, str, str], SiteRow] = {}
        for graph in self.graphs:
            for row in graph.sites:
                found.setdefault((graph.place, graph.bound_to, graph.mode, row.name), row)
        return tuple(found.values())

    @property
    def unaccounted(self) -> tuple[SiteRow, ...]:
        """Sites with neither a scheme nor a reason; always empty, and tested to be."""
        return tuple(row for row in self.sites if row.scheme is None and not row.reason)

    def to_json(self) -> str:
        """Everything, as JSON with a schema name and version."""
        graphs = [record_to_json(graph) for graph in self.graphs]
        return json.dumps({"schema": SCHEMA, "version": VERSION, "graphs": graphs}, indent=2, ensure_ascii=False)

    def to_text(self, width: int = 120) -> str:
        """The report as plain text."""
        from rich.console import Console

        console = Console(width=width, no_color=True, highlight=False, markup=False, soft_wrap=False)
        with console.capture() as capture:
            for part in _parts(self):
                console.print(part)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __str__(self) -> str:
        return self.to_text()


def record_to_json(record: GraphRecord) -> dict[str, Any]:
    """A record as JSON values; options that are no JSON values appear by their text."""
    values = asdict(replace(record, config=None))  # type: ignore[arg-type]
    values["config"] = json.loads(json.dumps(record.config.model_dump(), default=str))
    return values


def _parts(report: Report) -> Iterator[Any]:
    yield _summary(report)
    for note in dict.fromkeys(note for graph in report.graphs for note in graph.notes):
        yield f"  note: {note}"
    yield ""
    yield _coverage(report)
    yield _site_table(report)
    yield _rewrite_table(report)
    yield _stage_line(report)


def _summary(report: Report) -> str:
    linears = [row for row in report.sites if row.kind == "linear"]
    taken = [row for row in linears if row.scheme]
    schemes = ", ".join(f"{count} {name}" for name, count in Counter(row.scheme for row in taken).items())
    packed = [row for row in linears if row.kernel]
    before, after = sum(row.bytes_before for row in packed), sum(row.bytes_after for row in packed)
    first = report.graphs[0]
    lines = [
        f"fxquant: {len(taken)} of {len(linears)} linears quantized" + (f" ({schemes})" if schemes else "")
        + f", {_float_sites(report)}; {len(report.graphs)} graph(s), "
        f"codegen {first.codegen}, instruction set {first.isa}"
    ]  # fmt: skip
    if after:
        lines.append(
            f"  weights: {_bytes(before)} float, {_bytes(after)} packed; the float copies stay with the model "
            f"({_bytes(before + after)} resident)"
        )
    return "\n".join(lines)


def _float_sites(report: Report) -> str:
    left = [row for row in report.sites if row.scheme is None]
    own = sum(row.kernel is not None for row in left)
    return f"{len(left)} sites stay float" + (f" ({own} of them in kernels of fxquant)" if own else "")


def _coverage(report: Report) -> Any:
    table = _table("kind", "sites", "quantized", "float", "float, own kernel")
    for kind, rows in _grouped(report.sites, lambda row: row.kind):
        left = [row for row in rows if row.scheme is None]
        own = sum(row.kernel is not None for row in left)
        table.add_row(kind, *map(str, (len(rows), len(rows) - len(left), len(left) - own, own)))
    return table


def _site_table(report: Report) -> Any:
    times = TIMES if any(row.float_us is not None for row in report.sites) else {}
    table = _table("site", "becomes", "weight SQNR", "bytes", *times.values(), "class, or why it stays float")
    for name, rows in _folded(report.sites):
        first = rows[0]
        errors = [row.weight_sqnr_db for row in rows if row.weight_sqnr_db is not None]
        decibel = f"{min(errors):.0f} dB" if errors else ""
        before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
        size = f"{_bytes(before)} → {_bytes(after)}" if after else ""
        why = ": ".join(part for part in (first.error_class, first.reason, _static_noise(rows)) if part)
        spent = [_microseconds(rows, field) for field in times]
        table.add_row(name, first.scheme or "float", decibel, size, *spent, why)
    return table


def _static_noise(rows: list[SiteRow]) -> str:
    """How much noise static activations add (or save) against dynamic ones, over all sites of a line."""
    found = [row.static_noise_db for row in rows if row.static_noise_db is not None]
    if not found:
        return ""
    low, high = f"{min(found):+.1f}", f"{max(found):+.1f}"
    return f"static noise {low if low == high else f'{low} to {high}'} dB against dynamic, predicted"


def _microseconds(rows: list[SiteRow], field: str) -> str:
    """What the measured table promises for all sites of a line."""
    found = [getattr(row, field) for row in rows]
    return f"{sum(found):.0f}" if None not in found else ""


def _rewrite_table(report: Report) -> Any:
    rows = [row for graph in report.graphs for row in graph.rewrites]
    table = _table("rewrite", "class", "nodes", "fired, or why not")
    for (title, reason), group in _grouped(rows, lambda row: (row.title, row.reason)):
        table.add_row(title, group[0].error_class if _any_fired(group) else "", str(len(group)), reason or "fired")
    return table if rows else "No recognition rule found anything to rewrite."


def _any_fired(rows: list[RewriteRow]) -> bool:
    return any(row.fired for row in rows)


def _stage_line(report: Report) -> str:
    seconds: Counter[str] = Counter()
    for graph in report.graphs:
        for stage in graph.stages:
            seconds[stage.name] += stage.seconds  # type: ignore[assignment]
    return "stages: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in seconds.items())


def _folded(rows: tuple[SiteRow, ...]) -> list[tuple[str, list[SiteRow]]]:
    """Sites that differ in their layer numbers only, as one line with the numbers as a set."""
    groups: dict[tuple[str, str | None, str | None], list[SiteRow]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\d+", "{}", row.name), row.scheme, row.reason), []).append(row)
    return [(_folded_name(group), group) for group in groups.values()]


def _folded_name(rows: list[SiteRow]) -> str:
    pieces = re.split(r"\d+", rows[0].name)
    numbers = [list(dict.fromkeys(column)) for column in zip(*(re.findall(r"\d+", r.name) for r in rows), strict=True)]
    name = pieces[0]
    for column, piece in zip(numbers, pieces[1:], strict=True):
        name += (column[0] if len(column) == 1 else f"{{{_ranges(sorted(map(int, column)))}}}") + piece
    return name


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _grouped(rows: Any, key: Any) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"
