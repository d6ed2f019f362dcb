"""The result of a calibration: static qparams of linears by site name, saved as one safetensors file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from fxquant.calibration.qparams import StaticQParams
from fxquant.errors import CalibrationError

SCHEMA = "fxquant.calibration"
VERSION = 1
# A site is coded with static qparams only where that costs at most this much more noise than dynamic ones: 2 dB.
MOST_NOISE = 10**0.2


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


@dataclass(frozen=True)
class Calibration:
    """Site name → static qparams, with the method and the number of batches behind them."""

    method: str
    batches: int
    sites: Mapping[str, SiteCalibration]

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
