"""FXQUANT_DUMP: one folder a graph, one numbered file for each stage that changed it, with its diff, and the record.

A dump never stops a compilation: a folder that cannot be written is a warning.
"""

import difflib
import json
import re
import warnings
from pathlib import Path

from torch import fx

from fxquant.errors import FxQuantWarning
from fxquant.reporting.record import GraphRecord
from fxquant.reporting.report import record_to_json


class Dumper:
    """Writes the stages of one graph below ``folder``; does nothing where it is None."""

    def __init__(self, folder: str | None, name: str) -> None:
        self._folder: Path | None = None
        self._last = ""
        self._count = 0
        if folder is not None:
            self._folder = self._make_folder(Path(folder).expanduser(), re.sub(r"\W+", "_", name) or "graph")

    def stage(self, name: str, gm: fx.GraphModule) -> None:
        """Write the graph after a stage, unless the stage left it as it was."""
        if self._folder is None:
            return
        text = gm.print_readable(print_output=False)
        if text == self._last:
            return
        stem = f"{self._count:02d}-{name}"
        self._write(f"{stem}.py", text)
        if self._last:
            lines = difflib.unified_diff(self._last.splitlines(), text.splitlines(), "before", stem, lineterm="")
            self._write(f"{stem}.diff", "\n".join(lines) + "\n")
        self._last = text
        self._count += 1

    def record(self, record: GraphRecord) -> None:
        """Write what happened as JSON."""
        if self._folder is not None:
            self._write("record.json", json.dumps(record_to_json(record), indent=2, ensure_ascii=False) + "\n")

    def _make_folder(self, root: Path, name: str) -> Path | None:
        for number in range(10_000):
            folder = root / f"{name}-{number:03d}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                self._complain(root, error)
                return None
            return folder
        return None

    def _write(self, name: str, text: str) -> None:
        assert self._folder is not None
        try:
            (self._folder / name).write_text(text)
        except OSError as error:
            self._complain(self._folder, error)
            self._folder = None

    def _complain(self, where: Path, error: OSError) -> None:
        message = f"fxquant: the dump in {where} is given up: {error.strerror or error}"
        warnings.warn(message, FxQuantWarning, stacklevel=4)
