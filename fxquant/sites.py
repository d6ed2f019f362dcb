"""Sites: the places of a graph that could be quantized, each with a name that is stable across runs and recompiles."""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from fxquant import ops

OPERATORS = ops.LIBRARY  # importing ops defines the operators that recognition writes
aten = torch.ops.aten

# Overload packet → kind. What is not listed is no candidate: masks, position ids, index math, pointwise glue.
KINDS = {
    aten.linear: "linear",
    aten.matmul: "matmul",
    aten.mm: "matmul",
    aten.bmm: "matmul",
    aten.addmm: "matmul",
    aten.baddbmm: "matmul",
    aten.einsum: "matmul",
    aten.bilinear: "matmul",
    aten.scaled_dot_product_attention: "attention",
    torch.ops.fxquant.sigmoid_attention: "sigmoid_attention",
    aten.softmax: "softmax",
    aten._softmax: "softmax",
    aten.log_softmax: "softmax",
    aten.layer_norm: "layer_norm",
    aten.native_layer_norm: "layer_norm",
    aten.rms_norm: "rms_norm",
    aten.gelu: "gelu",
    aten.silu: "silu",
    aten.embedding: "embedding",
    aten.embedding_bag: "embedding",
    aten.conv1d: "conv",
    aten.conv2d: "conv",
    aten.conv3d: "conv",
    aten.convolution: "conv",
    aten.conv_transpose1d: "conv",
    aten.conv_transpose2d: "conv",
    aten.lstm: "recurrent",
    aten.gru: "recurrent",
    aten.rnn_tanh: "recurrent",
    aten.rnn_relu: "recurrent",
}


@dataclass(frozen=True)
class Site:
    """One place that could be quantized.

    ``name`` is ``<module path>:<op>``, with ``#2`` and so on where a module path holds the op more than once.
    ``shapes`` are the operand shapes as text (symbolic sizes by name), ``weight`` the name of the frozen weight.
    """

    name: str
    kind: str
    node: str
    shapes: tuple[str, ...]
    weight: str | None = None

    @property
    def path(self) -> str:
        """The module path, empty at the root."""
        return self.name.split(":")[0]


def find_sites(graph: fx.Graph) -> dict[fx.Node, tuple[Site, ...]]:
    """Every candidate node of a recognised graph with its sites (attention has two: qk and pv)."""
    seen: Counter[str] = Counter()
    found = {}
    for node in graph.nodes:
        kind = kind_of(node)
        if kind is None or node.meta.get("fxquant_folded"):  # what is folded is computed when weights are packed
            continue
        kinds = ("attention.qk", "attention.pv") if kind == "attention" else (kind,)
        found[node] = tuple(_site(node, part, seen) for part in kinds)
    return found


def kind_of(node: fx.Node) -> str | None:
    """The kind of candidate that a node is, or None."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "region"
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
        return None  # integer paths and masks are never sites
    return KINDS.get(node.target.overloadpacket)


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose forward made this node; empty at the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return clean_source(path)


def clean_source(source: str) -> str:
    """``L['self']._modules['layer']._modules['0'].weight`` → ``layer.0.weight``."""
    source = re.sub(r"^(L|G)\['(\w+)'\]", "", source)
    source = re.sub(r"\._(modules|parameters|buffers)\['([^']+)'\]", r".\2", source)
    source = re.sub(r"\[(?:'([^']+)'|(\d+))\]", lambda m: f".{m[1] or m[2]}", source)
    source = re.sub(r"getattr\((.*), '(\w+)'\)", r"\1.\2", source)
    return re.sub(r"@\d+", "", source).strip(".")


def _site(node: fx.Node, kind: str, seen: Counter[str]) -> Site:
    packet = getattr(node.target, "overloadpacket", node.target)
    op = kind if "." in kind else str(getattr(packet, "__name__", kind))
    weight = None
    if kind == "linear" and isinstance(node.args[1], fx.Node):
        weight = parameter_name(node.args[1])
    base = f"{_path(node, weight)}:{op}"
    seen[base] += 1
    return Site(
        name=base if seen[base] == 1 else f"{base}#{seen[base]}",
        kind=kind,
        node=node.name,
        shapes=tuple(_shape(arg) for arg in node.all_input_nodes),
        weight=weight,
    )


def _path(node: fx.Node, weight: str | None) -> str:
    """The module path; where the weight's own name says more (``self_attn.in_proj_weight``), that."""
    path = module_path(node)
    owner = re.sub(r"[._]?weight$", "", weight or "")
    return owner if owner.startswith(f"{path}." if path else "") else path


def parameter_name(node: fx.Node) -> str | None:
    """The user's name of the first Parameter or buffer that a value is made of, or None."""
    if node.meta.get("fxquant_folded"):  # the weight comes before what is folded into it; vectors have no name
        names = map(parameter_name, node.all_input_nodes)
        return next((name for name in names if name is not None), None)
    pending = [node]
    while pending:
        current = pending.pop(0)
        if current.op == "placeholder":
            return current.meta.get("fxquant_name")
        pending.extend(current.all_input_nodes)
    return None


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return "×".join(str(size) for size in value.shape) if isinstance(value, torch.Tensor) else str(value)
