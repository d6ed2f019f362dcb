"""What a reconstruction that is stopped keeps: every block that was done, in the calibration's checkpoint.

Of a site these are its codes and, where it is static, its qparams and shift, which may have been learned with the block.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fxquant.calibration.checkpoint import Checkpoint, States
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.reconstruction.coded import CodedLinear
from fxquant.calibration.site import Migration, SiteCalibration

ROUNDED = "rounded"  # stands beside a site's observers


@dataclass(frozen=True)
class Kept:
    """``sites``: site → tensors of an earlier run. ``seen``: what observers had seen, saved with them."""

    checkpoint: Checkpoint | None
    batches: int
    seen: States
    sites: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def of(cls, checkpoint: Checkpoint | None, batches: int, seen: States) -> Self:
        """What the checkpoint holds, if there is one."""
        _, states = checkpoint.load() if checkpoint is not None else (0, {})
        return cls(checkpoint, batches, seen, {name: states[name][ROUNDED] for name in states if ROUNDED in states[name]})

    def restored(self, linear: CodedLinear) -> SiteCalibration:
        """The site as the earlier run had it."""
        kept, known = self.sites[linear.site.name], linear.known
        static, migration = known.static, known.migration
        if isinstance(static, StaticQParams):
            scale, zero_point = float(kept["act_scale"]), int(kept["act_zero_point"])
            static = replace(static, factor=kept["act_factor"], scale=scale, zero_point=zero_point)
        if "shift" in kept:
            migration = Migration(None if migration is None else migration.factor, kept["shift"])
        return replace(linear.rounded(kept["codes"], kept["scale"]), static=static, migration=migration)

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
        rounded = {name: {ROUNDED: _tensors(each)} for name, each in done.items()}
        self.checkpoint.save(self.batches, {name: states | rounded.get(name, {}) for name, states in self.seen.items()})


def _tensors(site: SiteCalibration) -> dict[str, Tensor]:
    found = dict(site.codes.tensors()) if site.codes is not None else {}
    if isinstance(site.static, StaticQParams):
        found["act_factor"] = site.static.factor
        found["act_scale"] = torch.tensor(site.static.scale, dtype=torch.float64)
        found["act_zero_point"] = torch.tensor(site.static.zero_point)
    if site.migration is not None and site.migration.shift is not None:
        found["shift"] = site.migration.shift
    return found
