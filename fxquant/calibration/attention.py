"""What a calibration knows about one attention: the codings of q, k, the probabilities p and v.

::

    p = softmax(fake_quant(q) fake_quant(k)ᵀ · scale + mask)        y = fake_quant(p) fake_quant(v)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fxquant.calibration.digested import Digested
from fxquant.calibration.site import StaticCoding
from fxquant.formats import QParams

# Kind of site → the operands of its product.
OPERANDS = {"attention.qk": ("q", "k"), "attention.pv": ("p", "v")}


@dataclass(frozen=True, eq=False)
class AttentionCalibration(Digested):
    """Codings with static qparams; an operand that is None stays float."""

    q: StaticCoding | None = None
    k: StaticCoding | None = None
    p: StaticCoding | None = None
    v: StaticCoding | None = None

    @property
    def codings(self) -> dict[str, StaticCoding]:
        """Operand → its coding, of those that have one."""
        found = {name: getattr(self, name) for names in OPERANDS.values() for name in names}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def schemes(self) -> dict[str, str]:
        """Kind of site → a name such as ``affine4/affine4``, of those with a coded operand."""
        formats = {name: value.coding.format.name for name, value in self.codings.items()}
        return {
            kind: "/".join(formats.get(name, "float") for name in names)
            for kind, names in OPERANDS.items()
            if any(name in formats for name in names)
        }

    def tensors(self) -> Mapping[str, Tensor]:
        """Every qparam by ``operand_name``, in the order in which a graph reads them."""
        return {f"{name}_{key}": value for name, static in self.codings.items() for key, value in static.inputs.items()}

    def about(self) -> Any:
        """The coding of every operand."""
        return {name: value.about() for name, value in self.codings.items()}

    def without(self, kinds: Iterable[str]) -> "AttentionCalibration":
        """The same, with the operands of some kinds of site in float."""
        left = {name: None for kind in kinds for name in OPERANDS[kind]}
        return replace(self, **left) if left else self

    def fake_quant(self, operand: str, x: Tensor, tensors: QParams) -> Tensor:
        """An operand coded and decoded with its part of ``tensors``; as it is where it has no coding."""
        static = self.codings.get(operand)
        if static is None:
            return x
        return static.coding.fake_quant(x, {name: tensors[f"{operand}_{name}"] for name in static.inputs})


def attention_path(site: str) -> str:
    """The key of an attention in a calibration: the name of its attention.qk or attention.pv site without the kind.

    >>> attention_path("layers.0.attn:attention.qk#2")
    'layers.0.attn#2'
    """
    path, _, op = site.rpartition(":")
    return path + op.removeprefix("attention.")[len("qk") :]
