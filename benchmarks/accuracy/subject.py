"""What a model brings to the suite."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from accuracy.data import Split

Scores = dict[str, float]


@dataclass(frozen=True)
class Column:
    """A score: its key, its title, how it is printed, and whether the float row's value divides it (``ratio``)."""

    key: str
    title: str
    form: str = ".4f"
    ratio_of: str | None = None


class Subject(ABC):
    """A float model, the data that calibrate it and the scores of any form of it.

    ``damage``: the plotted score, its title, and a function of it that is 0 where nothing was lost.
    """

    name: str
    title: str
    protocol: str
    columns: tuple[Column, ...]
    damage: tuple[str, str, Callable[[float], float]]
    options: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def split(self) -> Split:
        """The items by their use."""

    @abstractmethod
    def load(self) -> nn.Module:
        """The float model.

        Raises:
            FileNotFoundError: a package or the trained weights are missing; the message says how to get them.
        """

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """Calibration batches, the same for one seed."""

    @abstractmethod
    def reference(self, model: nn.Module) -> Any:
        """What the float model gives, as far as ``score`` compares with it."""

    @abstractmethod
    def score(self, call: Callable[..., Any], reference: Any) -> Scores:
        """The scores of a form of the model that is called as the model is."""

    def takes(self, scheme: str) -> bool:
        """Whether a scheme says anything about this model."""
        return True


def is_weight_only(scheme: str) -> bool:
    """Whether activations stay float."""
    return "a16" in scheme
