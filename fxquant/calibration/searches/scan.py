"""A scan of a discrete choice: every value of one qparam, or every format of a family, the best by a metric.

The base of AdaLog, the split of twin uniform codes, the shift of SULQ and the format of FPQ are found by it.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.searches.metric import Candidates, Choice, Metric, choose
from fxquant.formats.base import Format


def scan_qparam(metric: Metric, format: Format, start: Mapping[str, Tensor], name: str, values: Sequence[float]) -> Choice:
    """Qparams [B, 1] like ``start`` with the best of ``values`` as ``name`` of every block; ties keep the first."""
    return choose(metric, [with_values(format, start, name, values)])


def with_values(format: Format, start: Mapping[str, Tensor], name: str, values: Sequence[float]) -> Candidates:
    """One candidate for each value."""
    like = start[name] if name in start else next(iter(start.values()))
    qparams = {key: value.expand(len(values), *value.shape) for key, value in start.items()}
    column = torch.tensor(values, dtype=torch.float32)[:, None, None].expand(len(values), *like.shape)
    return Candidates(format, {**qparams, name: column})


def scan_formats(metric: Metric, samples: Samples, formats: Iterable[Format]) -> Choice:
    """The format that is best over all blocks when fitted to the samples' values; ties keep the first."""
    return choose(metric, (_fitted(format, samples) for format in formats))


def _fitted(format: Format, samples: Samples) -> Candidates:
    return Candidates(format, {name: value[None] for name, value in format.fit(samples.values).items()})


def whole_numbers(values: range, blocks: int) -> Tensor:
    """The numbers as a qparam float32 [C, B, 1]: one candidate each."""
    return torch.tensor(list(values), dtype=torch.float32)[:, None, None].expand(-1, blocks, 1)
