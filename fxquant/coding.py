"""How one operand is coded: a number format at a granularity. The qparams are fixed by a calibration, or found at run time."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats import FAMILIES, Format, QParams
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

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads: names and fields, no tensors."""
        return {
            "format": {"family": type(self.format).__name__, **asdict(self.format)},  # type: ignore[call-overload]
            "granularity": {"kind": type(self.granularity).__name__, **asdict(self.granularity)},  # type: ignore[call-overload]
        }

    @staticmethod
    def from_json(values: Any) -> "Coding":
        """The coding that was written.

        Raises:
            FormatError: the values name no known family or granularity, or have wrong fields.
        """
        try:
            form, granularity = dict(values["format"]), dict(values["granularity"])
            made = FAMILIES[form.pop("family")](**form)
            return Coding(made, GRANULARITIES[granularity.pop("kind")](**granularity))
        except (KeyError, TypeError) as error:
            raise FormatError(f"{values!r} describes no coding: {error} is missing or wrong") from None
