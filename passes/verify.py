"""The graph is legal between stages: checked after every one."""

import torch
from torch import fx

from fxquant.errors import VerifyError

# Which fxquant:: operators may stand in the graph that a stage leaves behind.
ALLOWED: dict[str, frozenset[str]] = {
    "recognise": frozenset(),
    "quantize": frozenset({"fxquant::fake_quant_per_token", "fxquant::fake_quant_per_channel"}),
    "fuse": frozenset({"fxquant::linear_dynamic", "fxquant::rows"}),
}


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
    if name.startswith("fxquant::") and name not in ALLOWED[stage]:
        _fail(node, stage, f"{name} must not stand here")
    returns = node.target._schema.returns  # type: ignore[union-attr]
    if len(returns) == 1 and str(returns[0].type) == "Tensor" and not isinstance(node.meta.get("val"), torch.Tensor):
        _fail(node, stage, "the node has no value in its meta data")


def _fail(node: fx.Node, stage: str, problem: str) -> None:
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    around = "\n".join(f"{'->' if n is node else '  '} {n.format_node()}" for n in nodes[max(0, at - 5) : at + 5])
    raise VerifyError(f"after {stage}: {node.name}: {problem}\n{around}")
