"""Candidates and how they are judged: a metric gives the loss of every candidate for every block."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxquant.calibration.observers.base import CHUNK
from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.searches.objectives import second_order, squared_error
from fxquant.errors import CalibrationError
from fxquant.formats.base import Format
from fxquant.granularity import Granularity


@dataclass(frozen=True)
class Candidates:
    """Qparams float32 [C, B, 1] of one format: C candidates for each of B blocks."""

    format: Format
    qparams: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.qparams.values())))

    def at(self, index: int) -> dict[str, Tensor]:
        """The qparams [B, 1] of one candidate."""
        return {name: value[index] for name, value in self.qparams.items()}

    def pick(self, index: Tensor) -> dict[str, Tensor]:
        """Qparams [k, B, 1] of the candidates ``index`` [k, B] of every block."""
        return {name: value.gather(0, index.unsqueeze(-1)) for name, value in self.qparams.items()}


@dataclass(frozen=True)
class Choice:
    """The format and qparams float32 [B, 1] that a search found, with the mean loss float64 [B]."""

    format: Format
    qparams: Mapping[str, Tensor]
    loss: Tensor

    def fake_quant(self, x: Tensor, granularity: Granularity) -> Tensor:
        """x with the qparams of its blocks."""
        return granularity.restore(self.format.fake_quant(granularity.blocks(x), self.qparams), x)


class Metric(Protocol):
    """Judges candidates on data that it holds."""

    @property
    def site(self) -> str:
        """Name of the site, for errors."""

    def losses(self, candidates: Candidates) -> Tensor:
        """The mean loss of every candidate for every block, float64 [C, B]."""


@dataclass(frozen=True)
class TensorMetric:
    """The mean squared error of the tensor itself."""

    samples: Samples

    @property
    def site(self) -> str:
        """Name of the site, for errors."""
        return self.samples.site

    @torch.no_grad()
    def losses(self, candidates: Candidates) -> Tensor:
        """float64 [C, B]."""
        total = torch.zeros(len(candidates), self.samples.block_count, dtype=torch.float64)
        for blocks, values, counts in self.samples.chunks():
            for index in range(len(candidates)):
                qparams = {name: value[blocks] for name, value in candidates.at(index).items()}
                total[index, blocks] += squared_error(values, candidates.format.fake_quant(values, qparams), counts)
        counted = self.samples.counts
        return total / (self.samples.values.shape[1] if counted is None else counted.sum(1))


@dataclass(frozen=True)
class GramMetric:
    """The mean squared error of a linear's output for a weight [N, K], from XᵀX [K, K] of ``rows`` input rows; blocks are its
    rows. It equals the error on the rows themselves, at a cost that does not depend on their number."""

    site: str
    weight: Tensor
    gram: Tensor
    rows: int

    @torch.no_grad()
    def losses(self, candidates: Candidates) -> Tensor:
        """float64 [C, N]."""
        step = max(1, CHUNK // self.weight.shape[1])
        total = torch.empty(len(candidates), len(self.weight), dtype=torch.float64)
        for start in range(0, len(self.weight), step):
            rows = self.weight[start : start + step].to(torch.float32)
            for index in range(len(candidates)):
                qparams = {name: value[start : start + step] for name, value in candidates.at(index).items()}
                error = rows - candidates.format.fake_quant(rows, qparams)
                total[index, start : start + step] = second_order(error, self.gram)
        return total / self.rows


def choose(metric: Metric, families: Iterable[Candidates]) -> Choice:
    """The best candidate of every block, and the best format over all blocks; ties keep the first of both.

    Raises:
        CalibrationError: no candidate of a block has a finite loss.
    """
    best: Choice | None = None
    for family in families:
        choice = best_of(family, metric.losses(family))
        if best is None or float(choice.loss.sum()) < float(best.loss.sum()):
            best = choice
    return finite(metric.site, best)


def finite(site: str, choice: Choice | None) -> Choice:
    """The choice, if there is one and its losses are finite.

    Raises:
        CalibrationError: otherwise.
    """
    if choice is None or not bool(torch.isfinite(choice.loss).all()):
        raise CalibrationError(f"{site}: no candidate of a search has a finite loss; leave the site in float")
    return choice


def best_of(candidates: Candidates, losses: Tensor) -> Choice:
    """The candidate with the least of the losses [C, B] of every block; ties keep the first, NaN counts as infinite."""
    losses = torch.where(torch.isnan(losses), torch.inf, losses)
    index = losses.argmin(0, keepdim=True)
    chosen = {name: value[0] for name, value in candidates.pick(index).items()}
    return Choice(candidates.format, chosen, losses.gather(0, index)[0])


def range_candidates(format: Format, low: Tensor, high: Tensor) -> Candidates:
    """The candidates that a format fits to ranges low .. high, [C, B, 1] each."""
    ends = torch.cat([low, high], dim=-1)
    fitted = format.fit(ends.reshape(-1, 2))
    return Candidates(format, {name: value.reshape(*ends.shape[:2], 1) for name, value in fitted.items()})
