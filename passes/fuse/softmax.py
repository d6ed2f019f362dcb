"""softmax(x, -1)  →  fxquant::softmax(x), where that is faster than what Inductor generates

Inductor reads a row four times, though it fuses a softmax with its neighbours; in a small tensor that is the faster way.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from fxquant._compat import FakeTensorMode, size_hint
from fxquant.config import FxQuantConfig
from fxquant.lowering.schedule import softmax_wins
from fxquant.passes.fuse.fusion import Fusion, Verdict
from fxquant.passes.rule import REAL

aten = torch.ops.aten
LOGS = (aten.log_softmax.int,)
TARGETS = (aten.softmax.int, *LOGS)


def decide(node: fx.Node, settings: Mapping[str, str], config: FxQuantConfig, isa: str) -> Verdict:
    """Our kernel, or the sentence why Inductor's code stays."""
    for sentence, holds in conditions(node, isa):
        if not holds:
            return Verdict(sentence)
    return Verdict("softmax keeps float accuracy; our kernel measured faster on rows of this length", "softmax", REAL)


def conditions(node: fx.Node, isa: str) -> Iterator[tuple[str, bool]]:
    """(sentence, whether it holds); the first false one is what the report says."""
    source, dim = node.args[0], node.args[1] if len(node.args) > 1 else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    yield "softmax: only softmax and log_softmax over a given dimension have a kernel", node.target in TARGETS
    yield "softmax: the input must be a float32 tensor on the CPU", isinstance(value, Tensor) and _is_supported(value, node)
    assert isinstance(value, Tensor)
    yield "softmax: only the last dimension has a kernel", isinstance(dim, int) and dim % value.dim() == value.dim() - 1
    size = value.shape[-1]
    yield "softmax: the length of a row is not known, and short rows are Inductor's", isinstance(size, int)
    sizes = [size_hint(length) for length in value.shape]
    count = math.prod(length or 0 for length in sizes)  # of unknown size: Inductor's
    yield (
        f"softmax: {count} elements in rows of {size} are left to Inductor: no measurement on {isa} shows that our kernel is "
        "faster",
        softmax_wins(isa, int(size), count),
    )


def _is_supported(value: Tensor, node: fx.Node) -> bool:
    is_float = value.dtype == torch.float32 and node.meta["val"].dtype == torch.float32
    return is_float and value.device.type == "cpu" and value.dim() > 0


def fuse(node: fx.Node, verdict: Verdict, fake_mode: FakeTensorMode) -> fx.Node:
    """Replace the softmax by our operator; returns it."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(torch.ops.fxquant.softmax.default, (node.args[0], -1, node.target in LOGS))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return made


FUSION = Fusion(decide, fuse)
