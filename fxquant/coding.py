"""How one operand is coded: a number format at a granularity. The qparams are fixed by a calibration, or found at run time."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats import FAMILIES, PARTS, Format, QParams
from fxquant.granularity import GRANULARITIES, Granularity


@dataclass(frozen=True)
class Coding:
    """A format at a granularity; qparams are float32 [blocks, 1]."""

    format: Format
    granularity: Granularity

    def __str__(self) -> str:
        return f"{self.format.name} {self.granularity}"

    def fit(self, x: Tensor) -> QParams:
        """Qparams by the extent of every block of x."""
        return self.format.fit(self.granularity.blocks(x))

    def fake_quant(self, x: Tensor, qparams: QParams | None = None) -> Tensor:
        """x coded and decoded, in its shape and dtype; without qparams (dynamic) with those that fit x."""
        blocks = self.granularity.blocks(x)
        found = self.format.fit(blocks.detach()) if qparams is None else qparams
        return self.granularity.restore(self.format.fake_quant(blocks, found), x)

    def bits_per_value(self, x: Tensor) -> float:
        """Bits of storage a value of x, with qparams and the filling of short groups."""
        return self.format.storage_bits(*self.granularity.blocks(x).shape) / x.numel()

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads: names and fields, no tensors."""
        return {"format": _describe(self.format), "granularity": _describe(self.granularity)}

    @staticmethod
    def from_json(values: Any) -> "Coding":
        """The coding that was written.

        Raises:
            FormatError: the values name no known family or granularity, or have wrong fields.
        """
        try:
            return Coding(_rebuild(values["format"], FAMILIES), _rebuild(values["granularity"], GRANULARITIES))
        except (KeyError, TypeError) as error:
            raise FormatError(f"{values!r} describes no coding: {error} is missing or wrong") from None


def _describe(value: Any) -> Any:
    """A dataclass as its name and its fields; anything else as it is."""
    if not is_dataclass(value):
        return value
    return {"kind": type(value).__name__, **{each.name: _describe(getattr(value, each.name)) for each in fields(value)}}


def _rebuild(values: Any, kinds: Mapping[str, Any]) -> Any:
    given = {name: _field(value) for name, value in values.items()}
    return kinds[given.pop("kind")](**given)


def _field(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return _rebuild(value, PARTS) if isinstance(value, dict) else value
