"""Weights whose rounding is learned, from codes that another method found: AdaRound's, and straight through the rounding.

Both start as the given codes and end as codes, so the first and the last of them can be compared. With the ratio r = w / s:

- ``Rectified`` (AdaRound, arXiv 2004.10568): a code is the given one or its neighbour towards r, ``low + h(V)`` with h in
  0 .. 1 driven to 0 or 1 by the penalty. h starts at most ``HELD`` from the given code.
- ``Straight`` (I&S-ViT's third stage): r itself is tuned, rounded on the way forward, with gradient 1 inside of the range. It
  starts at the given code: nearer to r, a code that GPTQ chose against the nearest would be lost at the first step.

Scales are learned as relative changes where ``learns_scale`` says so.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fxquant.calibration.rounding.adaround import fraction_to_logit, penalty, soft_step
from fxquant.calibration.rounding.grid import straight_round
from fxquant.calibration.rounding.refitted import code_limits
from fxquant.reference import spread

LEAST_CHANGE = -0.9
HELD = 0.2  # of a step


class Soft(ABC):
    """A weight [N, K] that is learned: ``value()`` on the way, ``codes()`` in the end."""

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, group: int, learns_scale: bool) -> None:
        self._start, self._limits, self._group = scale, code_limits(bits, group), group
        self.change = torch.zeros_like(scale).requires_grad_(learns_scale)
        self._k = codes.shape[1]

    @property
    def scale(self) -> Tensor:
        """float32 [N] or [N, G]; it keeps its sign."""
        return self._start * (1 + self.change.clamp_min(LEAST_CHANGE))

    def value(self) -> Tensor:
        """The weight, differentiable."""
        return self._soft_codes() * spread(self.scale, self._k, self._group)

    def codes(self) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and scale: what was learned, as the kernels take it."""
        with torch.no_grad():
            return self._hard_codes().to(torch.int8), self.scale.detach().clone()

    @property
    @abstractmethod
    def rounding(self) -> Tensor:
        """The parameter [N, K] that decides the codes."""

    @abstractmethod
    def _soft_codes(self) -> Tensor: ...

    @abstractmethod
    def _hard_codes(self) -> Tensor: ...

    def penalty(self, beta: float) -> Tensor:
        """What drives codes to whole numbers."""
        return torch.zeros(())


class Rectified(Soft):
    """AdaRound's."""

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int, learns_scale: bool = False) -> None:
        super().__init__(codes, scale, bits, group, learns_scale)
        given = codes.to(torch.float32)
        ratio = weight / spread(scale, weight.shape[1], group)
        self._low = torch.where(ratio >= given, given, given - 1)
        inside = (ratio - self._low).clamp(0, 1)
        half = torch.where(self._low == given, inside.clamp_max(HELD), inside.clamp_min(1 - HELD))
        self.logit = fraction_to_logit(half).requires_grad_()

    @property
    def rounding(self) -> Tensor:
        return self.logit

    def _soft_codes(self) -> Tensor:
        return (self._low + soft_step(self.logit)).clamp(*self._limits)

    def _hard_codes(self) -> Tensor:
        return (self._low + (self.logit >= 0)).clamp(*self._limits)

    def penalty(self, beta: float) -> Tensor:
        """Σ (1 - |2h - 1|^β)."""
        return penalty(soft_step(self.logit), beta)


class Straight(Soft):
    """Straight through the rounding."""

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int, learns_scale: bool = False) -> None:
        super().__init__(codes, scale, bits, group, learns_scale)
        given = codes.to(torch.float32)
        self.ratio = given.clone().requires_grad_()

    @property
    def rounding(self) -> Tensor:
        return self.ratio

    def _soft_codes(self) -> Tensor:
        return straight_round(self.ratio.clamp(*self._limits))

    def _hard_codes(self) -> Tensor:
        return torch.round(self.ratio).clamp(*self._limits)


class Scaled(Soft):
    """Codes stay, only scales are learned."""

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, group: int, learns_scale: bool = True) -> None:
        super().__init__(codes, scale, bits, group, learns_scale)
        self._codes = codes

    @property
    def rounding(self) -> Tensor:
        return self.change

    def _soft_codes(self) -> Tensor:
        return self._codes.to(torch.float32)

    def _hard_codes(self) -> Tensor:
        return self._codes
