"""The result of a calibration: how each linear is coded, by site name, and each attention, by its path."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic_core import core_schema

from fxquant.calibration.attention import AttentionCalibration
from fxquant.calibration.files import Contents, Vectors, flat, read, write
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.site import INACCURATE, SiteCalibration, weight_digest
from fxquant.errors import CalibrationError

if TYPE_CHECKING:
    from fxquant.calibration.budgeting import BudgetedPlan
    from fxquant.schemes import LinearScheme

# Below this step weight times step could leave the normal range of float32; only an input that was about zero has it.
SMALLEST_STEP = 2.0**-80


@dataclass(frozen=True, eq=False)
class Calibration:
    """Site name → how it is coded, with the method and the number of batches behind them.

    ``reparameterize`` are the folds that the model was calibrated with, by name: it is compiled with the same. ``vectors``
    (rule → site → operand → tensor) are what migrations move between weights: operators that read one norm have the very same
    tensor. ``attention`` is by ``attention_path``: the name of an attention.qk site without the kind. ``plan`` is how a budget
    was kept, with the whole curve of time against error; it is not part of the file.

    Two calibrations with one digest are equal, so it can stand in options, which Dynamo compares::

        calibration = fxquant.calibrate(model, batches, scheme="w8a7")
        fast = torch.compile(model, backend="fxquant", options={"scheme": "w8a7", "calibration": calibration})
    """

    method: str
    batches: int
    sites: Mapping[str, SiteCalibration]
    plan: "BudgetedPlan | None" = field(default=None, compare=False)
    reparameterize: tuple[str, ...] = ()
    vectors: Vectors = field(default_factory=dict)
    attention: Mapping[str, AttentionCalibration] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything in it."""
        digest = hashlib.sha256(repr((self.method, self.batches, self.reparameterize)).encode())
        for name, site in sorted(self.sites.items()):
            digest.update(repr((name, site.digest)).encode())
        for place, vector in sorted(flat(self.vectors).items()):
            digest.update(repr((place, weight_digest(vector))).encode())
        for path, known in sorted(self.attention.items()):
            digest.update(repr(("attention", path, known.digest)).encode())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """In options a calibration is taken as it is, and printed as one line."""
        return core_schema.is_instance_schema(cls, serialization=core_schema.to_string_ser_schema())

    def find(self, name: str, scheme: "LinearScheme", shape: tuple[int, int]) -> SiteCalibration | str:
        """What is known of a site with this scheme and weight shape [N, K], or the sentence why it does without."""
        site, way = self.sites.get(name), "to the nearest" if scheme.is_weight_only else "dynamic"
        if site is None:
            return f"{way}: the calibration has no site of this name"
        if site.shape != shape:
            return f"{way}: the calibration is of a weight of {_times(site.shape)}, this one has {_times(shape)}"
        if site.scheme != str(scheme):
            return f"{way}: the calibration is of {site.scheme}, not of {scheme}"
        if isinstance(site.static, StaticQParams) and float(site.static.steps.amin()) < SMALLEST_STEP:
            return "dynamic: the input was zero in all of the calibration's data"
        if not site.is_accurate:
            return INACCURATE
        return site

    def scheme_of(self, name: str) -> str | None:
        """The scheme that a site was calibrated for by name; None where ``auto`` chose it, or the site is not known."""
        site = self.sites.get(name)
        return site.scheme if site is not None and site.is_explicit else None

    def save(self, path: str | Path) -> None:
        """Write one safetensors file.

        Raises:
            CalibrationError: it cannot be written; the calibration is still there.
        """
        about = {"method": self.method, "batches": self.batches, "reparameterize": self.reparameterize}
        write(path, about, Contents(self.sites, self.vectors, self.attention))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            CalibrationError: the file cannot be read, is damaged, or is no calibration of this version.
        """
        about, known = read(path)
        try:
            folds = tuple(about["reparameterize"])
            method, batches = about["method"], about["batches"]
            return cls(method, batches, known.sites, None, folds, known.vectors, known.attention)
        except KeyError as error:
            raise CalibrationError(f"calibration file {path} is damaged: {error} is missing or wrong") from None

    def __str__(self) -> str:
        static = sum(site.static is not None and site.is_accurate for site in self.sites.values())
        linears = f"{static} of {len(self.sites)} linears static"
        coded = f", {len(self.attention)} attentions coded" if self.attention else ""
        return f"calibration by {self.method} on {self.batches} batches: {linears}{coded}"


def _times(shape: tuple[int, int]) -> str:
    return "×".join(map(str, shape))
