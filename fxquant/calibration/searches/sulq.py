"""The shift η of SULQ codes: of the published candidates the one with the least mean squared error of the probabilities.

lo and Δ are recomputed from the extent for each η. vit-quantizers section 7.1, confirmed.
"""

from collections.abc import Sequence

import torch

from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.searches.metric import Candidates, Choice, Metric, TensorMetric, choose
from fxquant.formats.sulq import SHIFTS, Sulq


def sulq_shift(samples: Samples, format: Sulq, shifts: Sequence[float] = SHIFTS, *, metric: Metric | None = None) -> Choice:
    """Ties keep the first; ``metric`` is by default the error of the samples themselves."""
    ends = torch.cat(samples.extent(), dim=1)
    fitted = [format.fit_with(ends, shift) for shift in shifts]
    qparams = {name: torch.stack([one[name] for one in fitted]) for name in fitted[0]}
    return choose(metric or TensorMetric(samples), [Candidates(format, qparams)])
