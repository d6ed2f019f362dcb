"""What a calibration knows about one site: how its input is coded, what moves into its weight, how the weight was rounded.

The parts compose in this order, K input features, N outputs::

    x' = (x - shift) / factor        W' = W · factor        b' = b + W · shift        (migration; the same function)
    y = linear(fake_quant(x'), rounded(W'), b')
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.calibration.digested import Digested
from fxquant.calibration.qparams import StaticQParams
from fxquant.coding import Coding
from fxquant.reference import dequantize_weight

# A site is coded with static qparams only where that costs at most this much more noise than dynamic ones: 0.5 dB.
MOST_NOISE = 10**0.05
INACCURATE = "dynamic: static codes would cost more than 0.5 dB of noise, as predicted from the calibration's data"


@dataclass(frozen=True, eq=False)
class StaticCoding(Digested):
    """A coding with its qparams, float32 [blocks, 1] each."""

    coding: Coding
    qparams: Mapping[str, Tensor]

    def tensors(self) -> Mapping[str, Tensor]:
        """The qparams."""
        return self.qparams

    def about(self) -> Any:
        """The coding."""
        return self.coding.to_json()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the graph reads, by name."""
        return dict(sorted(self.qparams.items()))

    @property
    def noise_db(self) -> None:
        """Not predicted for number formats."""
        return None


@dataclass(frozen=True, eq=False)
class Migration(Digested):
    """What moves from a linear's input into its weight: a positive factor [K], a shift [K], float32; None: nothing."""

    factor: Tensor | None = None
    shift: Tensor | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """Those that there are."""
        found = {"factor": self.factor, "shift": self.shift}
        return {name: value for name, value in found.items() if value is not None}

    def about(self) -> Any:
        """Nothing but the tensors."""
        return None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the graph reads, by name."""
        return dict(self.tensors())


@dataclass(frozen=True, eq=False)
class WeightCodes(Digested):
    """A rounded weight: codes int8 [N, K], scale float32 [N], or [N, G] where ``group`` input features share one, and the
    digest of the float weight that it was made of.

    With ``coding`` (PerChannel(0), one scale a block) they are codes uint8 of its number format.
    """

    codes: Tensor
    scale: Tensor
    source: str
    group: int = 0
    coding: Coding | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """Codes and scale."""
        return {"codes": self.codes, "scale": self.scale}

    def about(self) -> Any:
        """The source, the group and the coding."""
        about = {"source": self.source, "group": self.group}
        return about if self.coding is None else {**about, "coding": self.coding.to_json()}

    @property
    def value(self) -> Tensor:
        """The weight that the codes stand for, float32 [N, K]."""
        if self.coding is not None:
            return self.coding.format.dequantize(self.codes.to(torch.int64), {"scale": self.scale[:, None]})
        return dequantize_weight(self.codes, self.scale, self.group)


@dataclass(frozen=True)
class SiteCalibration:
    """How one linear is coded: for this scheme and a weight of shape [N, K].

    ``static`` None: activations stay dynamic (``note`` says why), or float. ``codes`` None: the weight is rounded to the
    nearest when it is packed. ``is_explicit``: the scheme was asked for by name, so ``auto`` options take it over.
    """

    scheme: str
    shape: tuple[int, int]
    static: StaticQParams | StaticCoding | None = None
    migration: Migration | None = None
    codes: WeightCodes | None = None
    note: str | None = None
    is_explicit: bool = False

    @property
    def is_accurate(self) -> bool:
        """Whether static codes are about as accurate as dynamic ones, as far as was predicted."""
        static = self.static
        return not isinstance(static, StaticQParams) or static.noise <= MOST_NOISE * static.dynamic_noise

    @property
    def digest(self) -> str:
        """Of everything in it."""
        parts = (self.static, self.migration, self.codes)
        digests = [part.digest if part is not None else None for part in parts]
        return repr((self.scheme, self.shape, digests, self.note, self.is_explicit))


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of a weight's values as float32, so that a calibration knows the weight that it rounded."""
    return hashlib.sha256(weight.detach().to(torch.float32).contiguous().numpy().tobytes()).hexdigest()
