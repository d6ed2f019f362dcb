"""fxquant::sigmoid_attention stays what it is: recognition wrote the operator, the plan counts it."""

from collections.abc import Mapping

from torch import fx

from fxquant._compat import FakeTensorMode
from fxquant.config import FxQuantConfig
from fxquant.passes.fuse.fusion import Fusion, Verdict
from fxquant.passes.rule import REAL


def decide(node: fx.Node, settings: Mapping[str, str], config: FxQuantConfig, isa: str) -> Verdict:
    """Always ours: the operator has no other kernel."""
    return Verdict("sigmoid attention keeps float accuracy, in one sweep without an N x M buffer", "sigmoid_attention", REAL)


def fuse(node: fx.Node, verdict: Verdict, fake_mode: FakeTensorMode) -> fx.Node:
    """The node itself."""
    return node


FUSION = Fusion(decide, fuse)
