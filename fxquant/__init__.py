"""fxquant: ``torch.compile(model, backend="fxquant")`` quantizes a float transformer and accounts for every change."""

from fxquant.api import calibrate, explain, refresh, report
from fxquant.config import FxQuantConfig
from fxquant.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    FloatFallbackWarning,
    FxQuantError,
    FxQuantWarning,
    GradModeWarning,
    KernelBuildError,
    PackError,
    ReportError,
    RuleError,
    UnsupportedTorchError,
    VerifyError,
)

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "FloatFallbackWarning",
    "FxQuantConfig",
    "FxQuantError",
    "FxQuantWarning",
    "GradModeWarning",
    "KernelBuildError",
    "PackError",
    "ReportError",
    "RuleError",
    "UnsupportedTorchError",
    "VerifyError",
    "calibrate",
    "explain",
    "refresh",
    "report",
]
