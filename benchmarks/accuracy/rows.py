"""The file of rows: one JSON object a line, appended, so that a run that stops has lost nothing but the row at work."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One form of one model; ``seed`` draws the calibration data."""

    model: str
    scheme: str
    method: str
    seed: int

    def __str__(self) -> str:
        seed = f"seed {self.seed}" if self.method not in ("", "dynamic") else ""
        return " ".join(part for part in (f"{self.model}:", self.scheme, self.method, seed) if part)


@dataclass(frozen=True)
class Row:
    """A cell's scores, how many linears became what, and the seconds that calibration and scoring took."""

    cell: Cell
    protocol: str
    scores: dict[str, float]
    linears: dict[str, int]
    seconds: dict[str, float]
    version: str


def write(path: Path, row: Row) -> None:
    """Append a row; a line that a killed run left unfinished is ended first."""
    with path.open("a+b") as file:
        unfinished = file.seek(0, 2) > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
        file.write((b"\n" if unfinished else b"") + json.dumps(asdict(row)).encode() + b"\n")


def read(path: Path) -> dict[Cell, Row]:
    """The rows of a file, of which the last of a cell counts; a line that a killed run left unfinished is passed over."""
    rows: dict[Cell, Row] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            values: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        cell = Cell(**values.pop("cell"))
        rows[cell] = Row(cell, **values)
    return rows


def done(rows: Mapping[Cell, Row], protocols: Mapping[str, str]) -> set[Cell]:
    """The cells that need not be measured again: those of rows by the protocol that holds now."""
    return {cell for cell, row in rows.items() if protocols.get(cell.model) == row.protocol}


def of_model(rows: Iterable[Row], model: str) -> list[Row]:
    """The rows of one model."""
    return [row for row in rows if row.cell.model == model]
