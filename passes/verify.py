"""The graph is legal between stages: checked after every one."""

import torch
from torch import fx

from fxquant.errors import VerifyError

FAKE_QUANT = "fxquant::fake_quant"
# Differentiable operators of ours that recognition writes; they may stand anywhere.
RECOGNISED = frozenset({"fxquant::sigmoid_attention"})


def is_allowed(name: str, stage: str) -> bool:
    """Whether an fxquant:: operator may stand in the graph that a stage leaves: fake-quant in the specification only,
    kernels after fuse only."""
    if name in RECOGNISED:
        return True
    return stage == "quantize" if name.startswith(FAKE_QUANT) else stage == "fuse"


def verify(gm: fx.GraphModule, stage: str) -> None:
    """Check the graph that ``stage`` left behind.

    Raises:
        VerifyError: an illegal graph; the message shows ten nodes around the offence.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"after {stage}: {error}") from error
    seen_other = False
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if seen_other:
                _fail(node, stage, "an input comes after other nodes")
            continue
        seen_other = seen_other or node.op != "get_attr"
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _check_operator(node, stage)


def _check_operator(node: fx.Node, stage: str) -> None:
    name = node.target._schema.name  # type: ignore[union-attr]
    if name.startswith("fxquant::") and not is_allowed(name, stage):
        _fail(node, stage, f"{name} must not stand here")
    returns = node.target._schema.returns  # type: ignore[union-attr]
    if len(returns) == 1 and str(returns[0].type) == "Tensor" and not isinstance(node.meta.get("val"), torch.Tensor):
        _fail(node, stage, "the node has no value in its meta data")


def _fail(node: fx.Node, stage: str, problem: str) -> None:
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    around = "\n".join(f"{'->' if n is node else '  '} {n.format_node()}" for n in nodes[max(0, at - 5) : at + 5])
    raise VerifyError(f"after {stage}: {node.name}: {problem}\n{around}")
