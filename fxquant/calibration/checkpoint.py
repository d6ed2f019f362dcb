"""What a calibration has seen so far, in one safetensors file: so that it can be stopped and go on.

The file is replaced as a whole, every ``SECONDS`` and when the run is interrupted between two batches: in the middle of one
some sites have seen it and others have not, so the last save stands. It is gone once the calibration is done.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fxquant.calibration.digested import content_digest
from fxquant.errors import CalibrationError

SCHEMA, VERSION = "fxquant.calibration.checkpoint", 1
SECONDS = 30.0
States = dict[str, dict[str, dict[str, Tensor]]]  # site → observer → name → tensor


class Checkpoint:
    """The file of one run; ``identity`` is what has to be the same for it to go on: method, options, seed.

    Raises:
        CalibrationError: it can be no file; that is said before any data are seen.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        if path.is_dir() or not path.parent.is_dir():
            raise CalibrationError(f"checkpoint {path}: name a file in a folder that exists")
        self._path, self._identity, self._saved_at = path, dict(identity), time.monotonic()

    def load(self) -> tuple[int, States]:
        """How many batches were seen, and every observer's state; (0, {}) without a file.

        Raises:
            CalibrationError: the file cannot be read, or is that of another run.
        """
        from safetensors import SafetensorError, safe_open

        if not self._path.exists():
            return 0, {}
        try:
            with safe_open(str(self._path), framework="pt") as file:
                metadata = file.metadata() or {}
                flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            about = json.loads(metadata.get("fxquant", "{}"))
            if metadata.get("digest") != content_digest(metadata.get("fxquant", ""), flat):
                raise ValueError("its contents are not those that were written")
        except (OSError, SafetensorError, ValueError) as error:
            raise CalibrationError(f"checkpoint {self._path} cannot be read: {error}; delete it to start anew") from None
        if (about.get("schema"), about.get("version")) != (SCHEMA, VERSION):
            raise CalibrationError(f"{self._path} is no checkpoint of version {VERSION}; name another file")
        if about.get("identity") != self._identity:
            raise CalibrationError(
                f"checkpoint {self._path} is of another run ({about.get('identity')}, not {self._identity}); "
                "delete it, or name another file"
            )
        states: States = {}
        for name, value in flat.items():
            site, observer, key = name.rsplit("/", 2)
            states.setdefault(site, {}).setdefault(observer, {})[key] = value
        return int(about["batches"]), states

    def is_due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._saved_at >= SECONDS

    def save(self, batches: int, states: States) -> None:
        """Replace the file."""
        from safetensors.torch import save_file

        flat = {
            f"{site}/{observer}/{key}": value.contiguous()
            for site, observers in states.items()
            for observer, state in observers.items()
            for key, value in state.items()
        }
        text = json.dumps({"schema": SCHEMA, "version": VERSION, "identity": self._identity, "batches": batches})
        beside = self._path.with_name(self._path.name + ".part")
        save_file(flat, str(beside), {"fxquant": text, "digest": content_digest(text, flat)})
        os.replace(beside, self._path)
        self._saved_at = time.monotonic()

    def remove(self) -> None:
        """The run is done."""
        self._path.unlink(missing_ok=True)
