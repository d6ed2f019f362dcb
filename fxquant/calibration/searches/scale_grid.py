"""A grid of scales: ``s_i = s_0 (α + i (β - α) / K)``, each judged by a metric, usually that of the layer's output.

PTQ4ViT, FPQ and the APQ family: α = 0.01, β = 1.2, K = 100. The published list has 101 entries, of which the first 100 are
evaluated; so are they here. vit-quantizers section 2, confirmed.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxquant.calibration.observers.samples import Samples
from fxquant.calibration.searches.metric import Candidates, Choice, Metric, choose
from fxquant.errors import CalibrationError
from fxquant.formats.base import Format
from fxquant.formats.uniform import Uniform
from fxquant.reference import SMALLEST


def factors(alpha: float = 0.01, beta: float = 1.2, count: int = 100) -> tuple[float, ...]:
    """The evaluated ones: i = 0 .. count - 1. PTQ4ViT's base method has α = 0.5."""
    return tuple(alpha + i * (beta - alpha) / count for i in range(count))


def scale_grid(
    metric: Metric, format: Format, start: Mapping[str, Tensor], grid: Sequence[float] = factors(), *, name: str = "scale"
) -> Choice:
    """Qparams [B, 1] like ``start`` with the best multiple of ``name``; ties keep the first, which is the smallest."""
    refuse_power_of_two(metric.site, format)
    return choose(metric, [scaled(format, start, grid, name)])


def half_step_start(samples: Samples, format: Uniform) -> dict[str, Tensor]:
    """PTQ4ViT's and AdaLog's first scale of symmetric codes, ``max|x| / (2^(b-1) - 1/2)``: half a step is clipped at +max."""
    if not format.is_symmetric:
        raise CalibrationError(f"{samples.site}: {format.name} is not symmetric; start from min_max")
    low, high = samples.extent()
    return {"scale": (torch.maximum(-low, high) / (format.qmax + 0.5)).clamp_min(SMALLEST)}


def scaled(format: Format, start: Mapping[str, Tensor], grid: Sequence[float], name: str) -> Candidates:
    """One candidate for each factor."""
    times = torch.tensor(grid, dtype=torch.float64)[:, None, None]
    qparams = {key: value.expand(len(grid), *value.shape) for key, value in start.items()}
    values = (start[name] * times).to(torch.float32)
    return Candidates(format, {**qparams, name: values.clamp_min(SMALLEST) if name == "scale" else values})


def refuse_power_of_two(site: str, format: Format) -> None:
    """Refuse formats whose scales are powers of two: multiples are not.

    Raises:
        CalibrationError: naming the site.
    """
    if isinstance(format, Uniform) and format.power_of_two:
        raise CalibrationError(f"{site}: the scales of {format.name} are powers of two; use a search over ranges such as omse")
