"""The result of a calibration: static qparams of linears by site name, saved as one safetensors file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from pydantic_core import core_schema

from fxquant.calibration.qparams import StaticQParams
from fxquant.errors import CalibrationError

SCHEMA = "fxquant.calibration"
VERSION = 1
# A site is coded with static qparams only where that costs at most this much more noise than dynamic ones: 2 dB.
MOST_NOISE = 10**0.2
# Below this step weight times step could leave the normal range of float32; only an input that was about zero has it.
SMALLEST_STEP = 2.0**-80


@dataclass(frozen=True)
class SiteCalibration:
    """Static qparams of one linear: those of its scheme, for a weight of shape [N, K]."""

    qparams: StaticQParams
    scheme: str
    shape: tuple[int, int]

    @property
    def is_accurate(self) -> bool:
        """Whether static codes are about as accurate as dynamic ones."""
        return self.qparams.noise <= MOST_NOISE * self.qparams.dynamic_noise


@dataclass(frozen=True, eq=False)
class Calibration:
    """Site name → static qparams, with the method and the number of batches behind them.

    Two calibrations with one digest are equal, so it can stand in options, which Dynamo compares::

        calibration = fxquant.calibrate(model, batches, scheme="w8a7")
        fast = torch.compile(model, backend="fxquant", options={"scheme": "w8a7", "calibration": calibration})
    """

    method: str
    batches: int
    sites: Mapping[str, SiteCalibration]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything in it."""
        digest = hashlib.sha256(repr((self.method, self.batches)).encode())
        for name, site in sorted(self.sites.items()):
            digest.update(repr((name, site.scheme, site.shape, site.qparams.digest)).encode())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """In options a calibration is taken as it is, and printed as one line."""
        return core_schema.is_instance_schema(cls, serialization=core_schema.to_string_ser_schema())

    def find(self, name: str, scheme: str, shape: tuple[int, int]) -> StaticQParams | str:
        """The qparams of a site with this scheme and weight shape [N, K], or the sentence why it has to stay dynamic."""
        site = self.sites.get(name)
        if site is None:
            return "dynamic: the calibration has no site of this name"
        if site.shape != shape:
            return f"dynamic: the calibration is of a weight of {_times(site.shape)}, this one has {_times(shape)}"
        if site.scheme != scheme:
            return f"dynamic: the calibration is of {site.scheme}, not of {scheme}"
        if float(site.qparams.steps.amin()) < SMALLEST_STEP:
            return "dynamic: the input was zero in all of the calibration's data"
        if not site.is_accurate:
            return "dynamic: static codes would cost more than 2 dB of noise, as predicted from the calibration's data"
        return site.qparams

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the factors as tensors, everything else as JSON in its metadata."""
        from safetensors.torch import save_file

        tensors = {name: site.qparams.factor.contiguous() for name, site in self.sites.items()}
        about = {"schema": SCHEMA, "version": VERSION, "method": self.method, "batches": self.batches}
        sites = {name: _to_json(site) for name, site in self.sites.items()}
        save_file(tensors, str(path), {"fxquant": json.dumps({**about, "sites": sites})})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            CalibrationError: the file cannot be read, is damaged, or is no calibration of this version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("fxquant", "{}"))
                factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise CalibrationError(f"calibration file {path} cannot be read: {error}") from None
        if about.get("schema") != SCHEMA or about.get("version") != VERSION:
            raise CalibrationError(f"{path} is no calibration of version {VERSION}; write it again with fxquant.calibrate")
        try:
            sites = {name: _from_json(values, factors[name]) for name, values in about["sites"].items()}
            return cls(about["method"], about["batches"], sites)
        except (KeyError, TypeError) as error:
            raise CalibrationError(f"calibration file {path} is damaged: {error} is missing or wrong") from None

    def __str__(self) -> str:
        static = sum(site.is_accurate for site in self.sites.values())
        return f"calibration by {self.method} on {self.batches} batches: {static} of {len(self.sites)} linears static"


def _times(shape: tuple[int, int]) -> str:
    return "×".join(map(str, shape))


def _to_json(site: SiteCalibration) -> dict[str, Any]:
    q = site.qparams
    values = {"scale": q.scale, "zero_point": q.zero_point, "exponent": q.exponent}
    noise = {"noise": q.noise, "dynamic_noise": q.dynamic_noise}
    return {"scheme": site.scheme, "shape": list(site.shape), **values, **noise}


def _from_json(values: Mapping[str, Any], factor: torch.Tensor) -> SiteCalibration:
    names = ("scale", "zero_point", "exponent", "noise", "dynamic_noise")
    qparams = StaticQParams(factor, *(values[name] for name in names))
    n, k = values["shape"]
    if factor.shape != (k,):
        raise KeyError("a factor of the weight's width")
    return SiteCalibration(qparams, values["scheme"], (n, k))
