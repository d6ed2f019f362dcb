"""What a reconstruction that is stopped keeps: the codes of every block that was done, in the calibration's checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from fxquant.calibration.checkpoint import Checkpoint, States
from fxquant.calibration.site import SiteCalibration

ROUNDED = "rounded"  # stands beside a site's observers


@dataclass(frozen=True)
class Kept:
    """``sites``: site → (codes, scale) of an earlier run. ``seen``: what observers had seen, saved with them."""

    checkpoint: Checkpoint | None
    batches: int
    seen: States
    sites: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, checkpoint: Checkpoint | None, batches: int, seen: States) -> Self:
        """What the checkpoint holds, if there is one."""
        _, states = checkpoint.load() if checkpoint is not None else (0, {})
        rounded = {name: states[name][ROUNDED] for name in states if ROUNDED in states[name]}
        return cls(checkpoint, batches, seen, {name: (each["codes"], each["scale"]) for name, each in rounded.items()})

    @contextmanager
    def saved_if_stopped(self, done: Mapping[str, SiteCalibration]) -> Iterator[None]:
        """Saves what is done if the work inside is stopped, by Ctrl-C or an error."""
        try:
            yield
        except BaseException:
            self._save(done)
            raise

    def save_if_due(self, done: Mapping[str, SiteCalibration]) -> None:
        """Save what is done if the last save is long enough ago."""
        if self.checkpoint is not None and self.checkpoint.is_due():
            self._save(done)

    def _save(self, done: Mapping[str, SiteCalibration]) -> None:
        if self.checkpoint is None:
            return
        rounded = {name: {ROUNDED: dict(each.codes.tensors())} for name, each in done.items() if each.codes is not None}
        self.checkpoint.save(self.batches, {name: states | rounded.get(name, {}) for name, states in self.seen.items()})
