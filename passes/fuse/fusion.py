"""What it takes to run a site that is no linear in one of our kernels: a decider for the plan, a rewrite for fuse."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx

from fxquant._compat import FakeTensorMode
from fxquant.calibration.attention import AttentionCalibration
from fxquant.config import FxQuantConfig


@dataclass(frozen=True)
class Verdict:
    """What happens at one node.

    ``reason`` is the sentence that the report prints. ``kernel`` is the fxquant:: operator that takes the node's place
    (None: the node stays), ``error_class`` that of the replacement, ``schemes`` the scheme of each site kind that is
    quantized (``{"attention.qk": "qk6"}``). ``calibrated``: the codings of an attention, which becomes its specification
    where there is no kernel.
    """

    reason: str
    kernel: str | None = None
    error_class: str | None = None
    schemes: Mapping[str, str] = field(default_factory=dict)
    calibrated: AttentionCalibration | None = None

    @property
    def is_taken(self) -> bool:
        """Whether the node is replaced."""
        return self.kernel is not None or self.calibrated is not None


@dataclass(frozen=True)
class Fusion:
    """``decide(node, setting of each site kind, config, isa)`` and ``fuse(node, verdict, fake_mode)``, which replaces the
    node by one operator and returns it.

    The setting of a site is that of the first pattern of ``sites`` that names it, else ``auto``. It may be the name of a
    linear's scheme where a pattern covers a whole layer: a fusion ignores what is not its own.
    """

    decide: Callable[[fx.Node, Mapping[str, str], FxQuantConfig, str], Verdict]
    fuse: Callable[[fx.Node, Verdict, FakeTensorMode], fx.Node]
