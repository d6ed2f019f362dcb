"""Shift and factor of every input channel, learned for the least noise that is predicted at a linear's output. Ours.

The linear is computed as ``W f · q((x - s) / f) + W s`` (``calibration.site.Migration``). Rounding to a grid of step Δ
makes noise of Δ² / 12, so the noise at the output is, with the weight's columns w_k, its rows n and the counts c_t of the
tokens::

    dynamic:  Δ_t = extent of ((x_t - s) / f) / (2^b - 1)       A = mean_t Δ_t² · Σ_k f_k² |w_k|² / 12
    static:   f_k ≥ 1.1 max|x_k - s_k| / (2^(b-1) - 1)          A = Σ_k f_k² |w_k|² / 12
    weight:   Δ_n = max_k |W_nk f_k| / (2^(b-1) - 1)            B = Σ_n Δ_n² · Σ_k mean (x_k - s_k)² / f_k² / 12

log(A + 3 B) is minimised by Adam from SmoothQuant's factor with α = 1/2 (dynamic) or from the least steps (static), and the
mean as the shift. A large mean then costs no range and, since the weight's rounding acts on x - s alone, no noise either.
The 3 was chosen on SmolLM2's KL divergence on text held out from calibration, at 6 bits: 0.077 for 1/3, 0.073 for 1, 0.070
for 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from fxquant.calibration.observers import BalancedGram

STEPS, RATE = 60, 0.1
WEIGHT_SHARE = 3.0
SMALLEST_EXTENT = 1e-5
MARGIN = 1.1  # of the extent that was seen: what lies outside of it is clipped
Place = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # (change, move) → (factor, shift, steps of the rows)


@dataclass(frozen=True, eq=False)
class Balance:
    """Shift and factor float32 [K], and the noise A + 3 B."""

    shift: Tensor
    factor: Tensor
    noise: float


@dataclass(frozen=True, eq=False)
class Balancing:
    """One linear: weight float32 [N, K], what was seen of its input, some rows [R, K] of it, the bits of both operands."""

    weight: Tensor
    seen: BalancedGram
    rows: Tensor
    weight_bits: int
    act_bits: int

    def plain_noise(self) -> float:
        """A + 3 B without shift and factor, dynamic."""
        one = torch.ones(self.weight.shape[1])
        return float(self._noise(one, torch.zeros_like(one), self._token_steps(self.rows)))

    def dynamic(self) -> Balance:
        """For inputs that are coded per token."""
        mean = self.seen.mean
        extent = (self.rows - mean).abs().amax(0).clamp_min(SMALLEST_EXTENT)
        column = self.weight.abs().amax(0).clamp_min(SMALLEST_EXTENT)

        def place(change: Tensor, move: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            factor, shift = (extent / column).sqrt() * change.exp(), mean + move * extent
            return factor, shift, self._token_steps((self.rows - shift) / factor)

        return self._learn(place)

    def static(self) -> Balance:
        """For inputs with one step a channel; the factors are the steps, codes lie around the zero point 2^(b-1)."""
        mean, (low, high) = self.seen.mean, self.seen.extent
        reach = (2**self.act_bits - 2) // 2

        def place(change: Tensor, move: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            shift = mean + move * torch.maximum(high - mean, mean - low)
            extent = MARGIN * torch.maximum(high - shift, shift - low).clamp_min(SMALLEST_EXTENT)
            return extent / reach * change.exp(), shift, torch.ones(len(self.rows))

        return self._learn(place, least=0.0)

    def _learn(self, place: Place, least: float = -inf) -> Balance:
        """The best (factor, shift) of ``place(change, move)``; every change stays at or above ``least``."""
        change, move = (torch.zeros(self.weight.shape[1]).requires_grad_() for _ in range(2))
        adam = torch.optim.Adam([change, move], lr=RATE)
        best: Balance | None = None
        for step in range(STEPS):
            adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            with torch.enable_grad():
                factor, shift, steps = place(change, move)
                noise = self._noise(factor, shift, steps)
                adam.zero_grad()
                noise.log().backward()
            found = float(noise.detach())
            if best is None or found < best.noise:
                best = Balance(shift.detach().clone(), factor.detach().clone(), found)
            adam.step()
            change.data.clamp_(min=least)
        assert best is not None
        return best

    def _token_steps(self, rows: Tensor) -> Tensor:
        """Δ_t [R]."""
        extent = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0)
        steps: Tensor = extent / (2**self.act_bits - 1)
        return steps

    def _noise(self, factor: Tensor, shift: Tensor, steps: Tensor) -> Tensor:
        """A + 3 B for the steps of the rows, [R]."""
        act = (self._counts * steps.square()).sum() / self._counts.sum() * (factor.square() * self._columns).sum()
        square = self._square - 2 * shift * self.seen.mean + shift.square()
        row_steps = (self.weight.abs() * factor).amax(1) / (2 ** (self.weight_bits - 1) - 1)
        weight = row_steps.square().sum() * (square.clamp_min(0) / factor.square()).sum()
        noise: Tensor = (act + WEIGHT_SHARE * weight) / 12 + torch.finfo(torch.float32).tiny
        return noise

    @cached_property
    def _counts(self) -> Tensor:
        return self.seen.counts(self.rows)

    @cached_property
    def _columns(self) -> Tensor:
        return self.weight.square().sum(0)

    @cached_property
    def _square(self) -> Tensor:
        return self.seen.gram.diagonal().to(torch.float32)
