"""Budget: how much the model's outputs may change, for ``fxquant.calibrate(model, batches, budget=Budget(cosine=0.99))``.

| field | what is measured on the outputs of the float model (y) and of the quantized one (ŷ) | kept when |
|---|---|---|
| sqnr_db | 10 log10(Σ y² / Σ (y - ŷ)²), over all output tensors of floats | at least |
| cosine | mean over rows of the last axis of cos(y, ŷ) | at least |
| kl | mean over rows of KL(softmax y ‖ softmax ŷ), in nats | at most |
| metric, most | the mean of metric(outputs, quantized outputs) over batches, an error that grows | at most |
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from fxquant.errors import ConfigError, first_problem

Metric = Callable[[Any, Any], float]


class Budget(BaseModel):
    """One limit; frozen.

    Raises:
        ConfigError: no limit or more than one is given, ``metric`` stands without ``most``, or a value is out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    sqnr_db: float | None = Field(default=None, description="least signal to quantization noise of the outputs, in dB")
    cosine: float | None = Field(default=None, description="least mean cosine of the rows of the outputs")
    kl: float | None = Field(default=None, description="greatest mean KL divergence of the outputs' softmax, in nats")
    metric: Metric | None = Field(default=None, description="(float outputs, quantized outputs) → an error")
    most: float | None = Field(default=None, description="greatest mean error by ``metric``")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            place, problem, _ = first_problem(error)
            raise ConfigError(f"budget{f', {place}' if place else ''}: {problem}") from None

    @model_validator(mode="after")
    def _one_limit(self) -> "Budget":
        given = [name for name in ("sqnr_db", "cosine", "kl", "metric") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget has one of sqnr_db, cosine, kl or metric, not {', '.join(given) or 'none'}")
        if (self.metric is None) != (self.most is None):
            raise ValueError("a budget by metric has both: metric=function, most=greatest error")
        if self.cosine is not None and not -1 <= self.cosine < 1:
            raise ValueError(f"a cosine of {self.cosine} cannot be asked for; give one below 1, such as 0.99")
        if (self.kl is not None and self.kl <= 0) or (self.most is not None and self.most <= 0):
            raise ValueError("the greatest error must be above 0")
        return self

    @property
    def limit(self) -> float:
        """The greatest error that keeps the budget, in the unit of ``error``."""
        if self.sqnr_db is not None:
            return float(10 ** (-self.sqnr_db / 10))
        if self.cosine is not None:
            return 1 - self.cosine
        return float(self.kl if self.kl is not None else self.most or 0.0)

    def error(self, wanted: Any, got: Any) -> float:
        """Noise over signal, 1 - cosine, KL, or what the metric says; 0 where both are the same."""
        if self.metric is not None:
            return float(self.metric(wanted, got))
        pairs = list(zip(_floats(wanted), _floats(got), strict=True))
        if self.sqnr_db is not None:
            return noise_to_signal(pairs)
        rows = [(_rows(y), _rows(other)) for y, other in pairs]
        found = [cosine_error(y, other) if self.cosine is not None else kl_error(y, other) for y, other in rows]
        return float(torch.cat(found).mean()) if found else 0.0

    def value(self, error: float) -> float:
        """An error in the unit of the field that was given."""
        if self.sqnr_db is not None:
            return float(-10 * torch.log10(torch.tensor(max(error, 1e-30), dtype=torch.float64)))
        return 1 - error if self.cosine is not None else error


def noise_to_signal(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Σ (y - ŷ)² / Σ y², float64."""
    noise = sum(float((y - other).square().sum()) for y, other in pairs)
    signal = sum(float(y.square().sum()) for y, _ in pairs)
    return noise / signal if signal > 0 else float(noise > 0)


def cosine_error(y: Tensor, other: Tensor) -> Tensor:
    """1 - cosine of every row."""
    return 1 - torch.nn.functional.cosine_similarity(y, other, dim=-1)


def kl_error(y: Tensor, other: Tensor) -> Tensor:
    """KL(softmax y ‖ softmax other) of every row, in nats."""
    log_p, log_q = y.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _floats(outputs: Any) -> list[Tensor]:
    """The tensors of floats in nested mappings, lists and tuples, as float64."""
    if isinstance(outputs, Tensor):
        return [outputs.to(torch.float64)] if outputs.is_floating_point() else []
    inner = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (list, tuple)) else ()
    return [leaf for part in inner for leaf in _floats(part)]


def _rows(y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1]) if y.dim() else y.reshape(1, 1)
