"""Options of one compilation, and the one table of environment variables.

Precedence, highest first:

1. a key given in ``options={...}`` or a field of ``options=FxQuantConfig(...)``;
2. the TOML file named by the key ``config`` (top level, or its table ``[fxquant]``);
3. an environment variable of the table ``ENVIRONMENT`` (only ``dump`` has both);
4. the default written below.

For one site the first pattern of ``sites`` that matches wins over ``scheme`` and ``attention``. A scheme of attention
means nothing to a linear, nor one of a linear to attention: such a pattern is passed over there.

``inductor={"cpp_wrapper": True}`` has Inductor write the code around the kernels in C++ too. The bits are the same; on MiniLM
at 128 tokens the gain was too small to tell from noise, so it is no default.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fxquant.calibration.calibration import Calibration
from fxquant.errors import CalibrationError, ConfigError, first_problem
from fxquant.schemes import check_attention, check_setting, check_site_setting

ENVIRONMENT = {
    "FXQUANT_CACHE": "folder of the built kernel library (default: ~/.cache/fxquant)",
    "FXQUANT_DUMP": "folder to which each stage that changed a graph is written",
    "FXQUANT_ISA": "highest instruction set that kernels may use: scalar, avx2, avx_vnni or avx512_vnni",
    "FXQUANT_LOGS": "comma-separated loggers to print: any of " + ", ".join(("passes", "plan", "kernels")),
}
ISAS = ("scalar", "avx2", "avx_vnni", "avx512_vnni")
LOGGERS = ("passes", "plan", "kernels")


class FxQuantConfig(BaseModel):
    """Every option of ``torch.compile(model, backend="fxquant", options=...)``. Frozen; an unknown key is an error.

    Raises:
        ConfigError: a key, a scheme or a value is wrong; the message names the nearest valid one.
        CalibrationError: the file of the calibration cannot be read, or it was made with other reparameterizations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    scheme: str = Field("auto", description="of every linear: auto, float or w<bits>a<bits>[-g<size>], such as w8a7")
    sites: dict[str, str] = Field({}, description="site or parameter pattern → scheme; the first match wins")
    attention: str = Field(
        "auto",
        description="auto: float kernel, or codings by a method that has them; calibrated: codings by any method; "
        "off: PyTorch's; or qk8, qk6, qk8-pv8, qk6-pv8",
    )
    float_kernels: Literal["auto", "off"] = Field(
        "auto", description="auto: a linear that stays float runs in our kernel where the measured table says it is faster"
    )
    calibration: Calibration | None = Field(None, description="static activation ranges: a Calibration or its file")
    reparameterize: tuple[str, ...] = Field(
        (), description="folds into weights by name, such as norm_affine; empty: those that the calibration was made with"
    )
    codegen: Literal["inductor", "ops"] = Field("inductor", description="ops: run the graph without Inductor")
    chains: bool = Field(True, description="run linears and the row-wise work around them as one fxquant::rows")
    assume_inference: bool = Field(False, description="quantize although gradients are enabled; outputs have none")
    dump: str | None = Field(None, description="folder for the graph after each stage that changed it")
    inductor: dict[str, Any] = Field({}, description="Inductor config patches for this compilation")
    try_unsupported_torch: bool = Field(False, description="go on with a torch release that was never tested")

    def __init__(self, **values: Any) -> None:
        for key in values:
            if key not in type(self).model_fields:
                raise ConfigError(f"unknown option {key!r}; {_nearest(key, type(self).model_fields)}")
        if isinstance(values.get("calibration"), (str, Path)):
            values["calibration"] = Calibration.load(values["calibration"])
        if isinstance(values.get("reparameterize"), list):
            values["reparameterize"] = tuple(values["reparameterize"])
        try:
            super().__init__(**values)
        except ValidationError as error:
            place, problem, value = first_problem(error)
            raise ConfigError(f"option {place!r}: {problem}; got {value!r}") from None
        made_with = self.folds if self.calibration is None else self.calibration.reparameterize
        if self.reparameterize and {*self.reparameterize} != {*made_with}:
            raise CalibrationError(
                f"the calibration was made with reparameterize={[*made_with]}, and the options say {[*self.reparameterize]}: "
                "leave the option out, or calibrate again with it"
            )

    @property
    def folds(self) -> tuple[str, ...]:
        """The reparameterizations that run by name: those of the option, else those of the calibration."""
        return self.reparameterize or (self.calibration.reparameterize if self.calibration is not None else ())

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        return check_setting(value)

    @field_validator("sites")
    @classmethod
    def _known_site_schemes(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern, setting in value.items():
            if not pattern:
                raise ValueError("an empty pattern matches nothing; write '*' for every site")
            check_site_setting(setting)
        return value

    @field_validator("attention")
    @classmethod
    def _known_attention(cls, value: str) -> str:
        return check_attention(value)

    @field_validator("reparameterize")
    @classmethod
    def _known_reparameterizations(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_folds(value)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> Self:
        """The options of a TOML file, with ``overrides`` winning over the file.

        Raises:
            ConfigError: the file cannot be read, is no TOML, or holds a wrong option.
        """
        try:
            table = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"options file {path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"options file {path} is no valid TOML: {error}") from None
        table = table.get("fxquant", table)
        if not isinstance(table, dict):
            raise ConfigError(f"options file {path}: 'fxquant' must be a table")
        return cls(**{**table, **overrides})


@dataclass(frozen=True)
class Environment:
    """The environment variables of fxquant, checked."""

    cache: Path | None
    dump: str | None
    isa: int | None
    logs: tuple[str, ...]


def environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """What the FXQUANT_* variables say.

    Raises:
        ConfigError: an unknown FXQUANT_* name or a bad value.
    """
    for name in variables:
        if name.startswith("FXQUANT_") and name not in ENVIRONMENT:
            raise ConfigError(f"unknown environment variable {name}; {_nearest(name, ENVIRONMENT)}")
    isa = variables.get("FXQUANT_ISA") or None
    if isa is not None and isa not in ISAS:
        raise ConfigError(f"FXQUANT_ISA={isa!r} is not an instruction set; use one of {', '.join(ISAS)}")
    logs = tuple(part.strip() for part in variables.get("FXQUANT_LOGS", "").split(",") if part.strip())
    for name in logs:
        if name not in LOGGERS:
            raise ConfigError(f"FXQUANT_LOGS: unknown logger {name!r}; {_nearest(name, LOGGERS)}")
    cache = variables.get("FXQUANT_CACHE") or None
    return Environment(
        cache=Path(cache).expanduser() if cache else None,
        dump=variables.get("FXQUANT_DUMP") or None,
        isa=ISAS.index(isa) if isa else None,
        logs=logs,
    )


def resolve_options(options: object, mode: str | None = None) -> FxQuantConfig:
    """The config of one compilation from what the user gave to ``torch.compile``.

    ``mode`` is mapped to the Inductor options that ``torch.compile(mode=...)`` stands for.

    Raises:
        ConfigError: ``options`` is neither a mapping nor an FxQuantConfig, a key is unknown, or the mode is.
    """
    if options is None:
        config = FxQuantConfig()
    elif isinstance(options, FxQuantConfig):
        config = options
    elif isinstance(options, Mapping):
        values = dict(options)
        file = values.pop("config", None)
        config = FxQuantConfig(**values) if file is None else FxQuantConfig.from_toml(file, **values)
    else:
        raise ConfigError(f"options must be a dict or an FxQuantConfig, not {type(options).__name__}")
    if mode is not None:
        config = config.model_copy(update={"inductor": {**_mode_patches(mode), **config.inductor}})
    return config


def override_options(options: object, **changes: Any) -> FxQuantConfig:
    """The config of ``options`` with some fields set otherwise; raises as ``resolve_options`` does."""
    if isinstance(options, FxQuantConfig):
        return resolve_options({name: getattr(options, name) for name in options.model_fields_set} | changes)
    return resolve_options({**options, **changes} if isinstance(options, Mapping) else changes if options is None else options)


def check_folds(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, if each is that of a reparameterization that needs nothing but weights; ConfigError otherwise."""
    if not names:
        return names
    from fxquant.passes.reparam import REPARAMS  # imports Dynamo, which `import fxquant` must not pay for

    rules = {rule.name: rule for rule in REPARAMS}
    folds = {name: rule for name, rule in rules.items() if not rule.vectors}
    for name in names:
        if name in rules and name not in folds:
            raise ConfigError(f"{name!r} needs vectors of data and runs by a calibration that has them, not by its name")
        if name not in folds:
            raise ConfigError(f"unknown reparameterization {name!r}; {_nearest(name, folds)}")
    return names


def _mode_patches(mode: str) -> dict[str, Any]:
    from fxquant._compat import inductor_modes  # imports Dynamo, which `import fxquant` must not pay for

    modes = inductor_modes()
    if mode not in modes:
        raise ConfigError(f"unknown mode {mode!r}; {_nearest(mode, modes)}")
    return dict(modes[mode])


def _nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known)
