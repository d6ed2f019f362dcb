"""Every error and warning of fxquant.

FxQuantError                    base of all errors
├── ConfigError                 an option, a scheme, a pattern or an environment variable is wrong
├── UnsupportedTorchError       this torch release is not supported
├── CaptureError                a graph cannot be brought to normal form (caught: the graph stays float)
├── RuleError                   a rule is written wrongly (a defect of the rule, not of the user's model)
├── VerifyError                 a stage left an illegal graph behind (caught: the graph stays float)
├── KernelBuildError            the kernel library cannot be built or loaded
├── PackError                   a weight cannot be packed
├── FormatError                 a number format or granularity does not fit the tensor or the values
├── CalibrationError            data, a method or a calibration file is wrong
└── ReportError                 there is nothing to report on

FxQuantWarning                  base of all warnings
├── GradModeWarning             compiled with gradients enabled: the graph stays float
└── FloatFallbackWarning        a whole graph stays float for a reason that the report also gives
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class FxQuantError(Exception):
    """Base of every error that fxquant raises."""


class ConfigError(FxQuantError, ValueError):
    """An option, a scheme, a pattern or an environment variable is wrong."""


class UnsupportedTorchError(FxQuantError, RuntimeError):
    """The installed torch release is not one of the supported ones."""


class CaptureError(FxQuantError):
    """A captured graph cannot be brought to normal form; the backend catches it and compiles the graph as float."""


class RuleError(FxQuantError):
    """A rule is written wrongly: its pattern, rewrite and precondition do not fit together."""


class VerifyError(FxQuantError):
    """A stage left an illegal graph behind; the message shows the nodes around the offence."""


class KernelBuildError(FxQuantError, RuntimeError):
    """The kernel library cannot be built or loaded; the message holds the compiler's own words."""


class PackError(FxQuantError, ValueError):
    """A weight cannot be packed for the kernels."""


class FormatError(FxQuantError, ValueError):
    """A number format or a granularity does not fit a tensor, or its parameters are out of range."""


class CalibrationError(FxQuantError, ValueError):
    """Calibration data, its method or a calibration file is wrong."""


class ReportError(FxQuantError, ValueError):
    """There is nothing to report on: the object was not compiled with fxquant, or has not been called yet."""


class FxQuantWarning(UserWarning):
    """Base of every warning that fxquant emits."""


class GradModeWarning(FxQuantWarning):
    """The model was compiled with gradients enabled, so the graph stays float and differentiable."""


class FloatFallbackWarning(FxQuantWarning):
    """A whole graph stays float; the report gives the same reason."""


def first_problem(error: "ValidationError") -> tuple[str, str, Any]:
    """Where the first problem that pydantic found is, what it is, and the value: "" where no single field is to blame."""
    first = error.errors()[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"], first["input"]
