"""When learning ends before its time, and what it leaves behind: the best that was measured, the beginning among it."""

from dataclasses import dataclass, field
from typing import Any

LEAST_GAIN = 1e-3  # relative


@dataclass
class EarlyStop:
    """Keeps the state of least error. ``is_over`` once ``patience`` measurements in a row were no 0.1 % better than the best
    before them."""

    patience: int
    best: Any = None
    error: float = float("inf")
    measured: list[float] = field(default_factory=list)
    _idle: int = 0

    def measure(self, error: float, state: Any) -> None:
        """Take a measurement and the state that it is of into account; an error that is not finite never is the best."""
        self.measured.append(error)
        self._idle = 0 if error < self.error * (1 - LEAST_GAIN) else self._idle + 1
        if error < self.error:
            self.error, self.best = error, state

    @property
    def is_over(self) -> bool:
        """Whether it is time to stop."""
        return self._idle >= self.patience
