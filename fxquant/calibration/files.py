"""Calibrations as one safetensors file: tensors by ``site/part/name``, everything else as JSON in the metadata.

Qparams of attention are ``attention/path/operand/name``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fxquant.calibration.attention import AttentionCalibration
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.site import Migration, SiteCalibration, StaticCoding, WeightCodes
from fxquant.coding import Coding
from fxquant.errors import CalibrationError, FormatError

SCHEMA = "fxquant.calibration"
VERSION = 2
_ATTENTION = "attention/"
_NUMBERS = ("scale", "zero_point", "exponent", "noise", "dynamic_noise")


def write(
    path: str | Path,
    about: Mapping[str, Any],
    sites: Mapping[str, SiteCalibration],
    attention: Mapping[str, AttentionCalibration],
) -> None:
    """Write one file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    described = {}
    for name, site in sites.items():
        described[name] = _describe(site)
        for part, values in _parts(site).items():
            tensors |= {f"{name}/{part}/{key}": value.contiguous() for key, value in values.items()}
    for name, known in attention.items():
        for operand, static in known.codings.items():
            tensors |= {f"{_ATTENTION}{name}/{operand}/{key}": value.contiguous() for key, value in static.qparams.items()}
    codings = {name: known.about() for name, known in attention.items()}
    text = json.dumps({"schema": SCHEMA, "version": VERSION, **about, "sites": described, "attention": codings})
    save_file(tensors, str(path), {"fxquant": text})


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, SiteCalibration], dict[str, AttentionCalibration]]:
    """What ``write`` was given.

    Raises:
        CalibrationError: the file cannot be read, is damaged, or is no calibration of this version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("fxquant", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CalibrationError(f"calibration file {path} cannot be read: {error}") from None
    if about.get("schema") != SCHEMA or about.get("version") != VERSION:
        raise CalibrationError(f"{path} is no calibration of version {VERSION}; write it again with fxquant.calibrate")
    try:
        described, codings = about.pop("sites"), about.pop("attention", {})
        sites = {name: _rebuild(values, _under(tensors, name)) for name, values in described.items()}
        attention = {name: _attention(values, _under(tensors, _ATTENTION + name)) for name, values in codings.items()}
        return about, sites, attention
    except (KeyError, TypeError, ValueError, FormatError) as error:
        raise CalibrationError(f"calibration file {path} is damaged: {error} is missing or wrong") from None


def _parts(site: SiteCalibration) -> dict[str, Mapping[str, Tensor]]:
    found: dict[str, Mapping[str, Tensor]] = {}
    if isinstance(site.static, StaticQParams):
        found["static"] = {"factor": site.static.factor}
    elif site.static is not None:
        found["static"] = site.static.tensors()
    if site.migration is not None:
        found["migration"] = site.migration.tensors()
    if site.codes is not None:
        found["weight"] = site.codes.tensors()
    return found


def _describe(site: SiteCalibration) -> dict[str, Any]:
    about: dict[str, Any] = {"scheme": site.scheme, "shape": list(site.shape), "is_explicit": site.is_explicit}
    if isinstance(site.static, StaticQParams):
        about["static"] = {name: getattr(site.static, name) for name in _NUMBERS}
    elif site.static is not None:
        about["coding"] = site.static.about()
    if site.codes is not None:
        about["weight"] = site.codes.about()
    return about if site.note is None else {**about, "note": site.note}


def _rebuild(values: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> SiteCalibration:
    n, k = values["shape"]
    static: StaticQParams | StaticCoding | None = None
    if "static" in values:
        static = StaticQParams(parts["static"]["factor"], *(values["static"][name] for name in _NUMBERS))
        _check(static.factor, (k,))
    elif "coding" in values:
        static = StaticCoding(Coding.from_json(values["coding"]), parts["static"])
    migration = Migration(**parts["migration"]) if "migration" in parts else None
    for vector in migration.tensors().values() if migration is not None else ():
        _check(vector, (k,))
    weight = parts.get("weight")
    codes = None if weight is None else WeightCodes(weight["codes"], weight["scale"], **values["weight"])
    if codes is not None:
        _check(codes.codes, (n, k))
    return SiteCalibration(
        values["scheme"], (n, k), static, migration, codes, values.get("note"), bool(values.get("is_explicit", False))
    )


def _attention(values: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> AttentionCalibration:
    return AttentionCalibration(
        **{name: StaticCoding(Coding.from_json(coding), parts[name]) for name, coding in values.items()}
    )


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"a tensor of shape {shape} (this one has {tuple(tensor.shape)})")


def _under(tensors: Mapping[str, Tensor], site: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of one site by part and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, part, key = name.rsplit("/", 2)
        if owner == site:
            found.setdefault(part, {})[key] = tensor
    return found
