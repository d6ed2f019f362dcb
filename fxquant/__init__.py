"""fxquant: ``torch.compile(model, backend="fxquant")`` quantizes a float transformer and accounts for every change."""

from fxquant.api import calibrate, explain, find_vectors, rank_errors, refresh, report
from fxquant.budget import Budget
from fxquant.config import FxQuantConfig
from fxquant.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    FloatFallbackWarning,
    FormatError,
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
    "Budget",
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "FloatFallbackWarning",
    "FormatError",
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
    "find_vectors",
    "rank_errors",
    "refresh",
    "report",
]
