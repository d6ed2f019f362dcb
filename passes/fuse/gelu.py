"""gelu(x)  →  fxquant::gelu(x): max(x, 0) - |x| q(|x|) with the upper tail q as the eighth power of a polynomial

Inductor then computes GELU with two dozen multiplications and additions, where its own code takes an exponential and a
division; in the epilogue of a linear it costs half as much.
"""

from collections.abc import Mapping

import torch
from torch import fx

from fxquant._compat import FakeTensorMode
from fxquant.config import FxQuantConfig
from fxquant.passes.fuse.fusion import Fusion, Verdict
from fxquant.passes.rule import REAL


def decide(node: fx.Node, settings: Mapping[str, str], config: FxQuantConfig, isa: str) -> Verdict:
    """The polynomial where Inductor generates the code, else the sentence why the operator stays."""
    value = node.meta["val"]
    if settings["gelu"] == "float":
        return Verdict("GELU: the options ask for float")
    if config.codegen != "inductor":
        return Verdict("GELU keeps float accuracy, in PyTorch's own kernel: codegen is ops")
    if value.dtype != torch.float32 or value.device.type != "cpu":
        return Verdict("GELU keeps float accuracy; the polynomial is for float32 on the CPU")
    return Verdict("GELU keeps float accuracy, as a polynomial: largest error 5e-7 of max(1, |y|)", "gelu", REAL)


def fuse(node: fx.Node, verdict: Verdict, fake_mode: FakeTensorMode) -> fx.Node:
    """Replace the GELU by our operator; returns it."""
    tanh = node.kwargs.get("approximate", "none") == "tanh"
    with node.graph.inserting_before(node):
        made = node.graph.call_function(torch.ops.fxquant.gelu.default, (node.args[0], tanh))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return made


FUSION = Fusion(decide, fuse)
