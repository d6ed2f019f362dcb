"""Calibrations as one safetensors file: tensors by ``site/part/name``, everything else as JSON in the metadata.

Vectors of a reparameterization are the part ``reparameterize.<rule>`` of their site, qparams of attention are
``attention/path/operand/name``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.calibration.attention import AttentionCalibration
from fxquant.calibration.digested import content_digest
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.site import Migration, SiteCalibration, StaticCoding, WeightCodes
from fxquant.coding import Coding
from fxquant.errors import CalibrationError, FormatError

SCHEMA = "fxquant.calibration"
VERSION = 3
Vectors = Mapping[str, Mapping[str, Mapping[str, Tensor]]]  # rule → site → operand → tensor
_VECTORS = "reparameterize."
_ATTENTION = "attention/"


@dataclass(frozen=True)
class Contents:
    """What a file holds besides JSON: linears by site name, vectors of reparameterizations, attention by path."""

    sites: Mapping[str, SiteCalibration]
    vectors: Vectors
    attention: Mapping[str, AttentionCalibration]


def write(path: str | Path, about: Mapping[str, Any], contents: Contents) -> None:
    """Write one file.

    Raises:
        CalibrationError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, site in contents.sites.items():
        for part, values in _parts(site).items():
            tensors |= {f"{name}/{part}/{key}": value.contiguous() for key, value in values.items()}
    for (rule, site_name, operand), vector in flat(contents.vectors).items():
        tensors[f"{site_name}/{_VECTORS}{rule}/{operand}"] = vector.clone()  # a file has no shared tensors
    for name, known in contents.attention.items():
        for operand, static in known.codings.items():
            tensors |= {f"{_ATTENTION}{name}/{operand}/{key}": value.contiguous() for key, value in static.qparams.items()}
    described = {
        "sites": {name: _describe(site) for name, site in contents.sites.items()},
        "attention": {name: known.about() for name, known in contents.attention.items()},
    }
    text = json.dumps({"schema": SCHEMA, "version": VERSION, **about, **described})
    try:
        save_file(tensors, str(path), {"fxquant": text, "digest": content_digest(text, tensors)})
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"calibration file {path} cannot be written: {error}") from None


def read(path: str | Path) -> tuple[dict[str, Any], Contents]:
    """What ``write`` was given.

    Raises:
        CalibrationError: the file cannot be read, is damaged, or is no calibration of this version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata.get("fxquant", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise CalibrationError(
            f"calibration file {path} cannot be read: {error}; is it cut off? Copy it again, or calibrate again"
        ) from None
    if about.get("schema") != SCHEMA or about.get("version") != VERSION:
        raise CalibrationError(f"{path} is no calibration of version {VERSION}; write it again with fxquant.calibrate")
    if metadata.get("digest") != content_digest(metadata["fxquant"], tensors):
        raise CalibrationError(f"calibration file {path} is damaged: its contents are not those that were written")
    try:
        sites = {name: _rebuild(values, _under(tensors, name)) for name, values in about.pop("sites").items()}
        attention = {
            name: _attention(values, _under(tensors, _ATTENTION + name)) for name, values in about.pop("attention").items()
        }
        return about, Contents(sites, _vectors(tensors), attention)
    except (KeyError, TypeError, ValueError, FormatError) as error:
        raise CalibrationError(f"calibration file {path} is damaged: {error} is missing or wrong") from None


def flat(vectors: Vectors) -> dict[tuple[str, str, str], Tensor]:
    """Vectors by (rule, site, operand)."""
    return {
        (rule, site, operand): vector
        for rule, by_site in vectors.items()
        for site, operands in by_site.items()
        for operand, vector in operands.items()
    }


def _vectors(tensors: Mapping[str, Tensor]) -> Vectors:
    """The vectors of a file. Equal ones become one tensor again: operators that share a value have to share them."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    known: dict[tuple[object, ...], Tensor] = {}
    for name, tensor in tensors.items():
        site, part, operand = name.rsplit("/", 2)
        if part.startswith(_VECTORS):
            contents = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            same = known.setdefault((tensor.dtype, tuple(tensor.shape), contents), tensor)
            found.setdefault(part.removeprefix(_VECTORS), {}).setdefault(site, {})[operand] = same
    return found


def _parts(site: SiteCalibration) -> dict[str, Mapping[str, Tensor]]:
    found: dict[str, Mapping[str, Tensor]] = {}
    if site.static is not None:
        found["static"] = site.static.tensors()
    if site.migration is not None:
        found["migration"] = site.migration.tensors()
    if site.codes is not None:
        found["weight"] = site.codes.tensors()
    return found


def _describe(site: SiteCalibration) -> dict[str, Any]:
    about: dict[str, Any] = {"scheme": site.scheme, "shape": list(site.shape), "is_explicit": site.is_explicit}
    if isinstance(site.static, StaticQParams):
        about["static"] = site.static.about()
    elif site.static is not None:
        about["coding"] = site.static.about()
    if site.codes is not None:
        about["weight"] = site.codes.about()
    return about if site.note is None else {**about, "note": site.note}


def _rebuild(values: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> SiteCalibration:
    n, k = values["shape"]
    static: StaticQParams | StaticCoding | None = None
    if "static" in values:
        static = StaticQParams(parts["static"]["factor"], **values["static"])
        _check(static.factor, (k,))
    elif "coding" in values:
        static = StaticCoding(Coding.from_json(values["coding"]), parts["static"])
    migration = Migration(**parts["migration"]) if "migration" in parts else None
    for vector in migration.tensors().values() if migration is not None else ():
        _check(vector, (k,))
    codes = None
    if "weight" in parts:
        about = dict(values["weight"])
        coding = Coding.from_json(about.pop("coding")) if "coding" in about else None
        codes = WeightCodes(parts["weight"]["codes"], parts["weight"]["scale"], **about, coding=coding)
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
