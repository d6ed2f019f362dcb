"""The residual stream of a graph: every value that adds join, with all that writes it and all that reads it.

The rule ``rotation`` says what is done to each writer and reader; here stands for which graphs all of them are known.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import RuleError
from fxquant.passes.channels import carried, have_one_width, is_not_last, operator_name
from fxquant.passes.reparam.legality import UNTIED
from fxquant.passes.reparam.rotation import (
    ORTHOGONAL,
    RULE,
    SQUARE,
    centred_columns,
    centred_rows,
    columns,
    is_orthogonal,
    rows,
)
from fxquant.passes.reweight import Place, set_argument, write_value
from fxquant.passes.rule import Event, Fired, Refused

aten = torch.ops.aten
NORMS = {aten.layer_norm.default: ("weight", "bias"), aten.rms_norm.default: ("weight",)}
AFFINE = "a norm on the stream has γ or β: fold them into the linears first (norm_affine)"
READER = "the norm of a stream must be read by linears alone, and {} reads it"
WRITER = "the stream must be made of linears, embeddings and constants, and {} writes it"
USER = "the stream must be read by norms alone, and {} reads it"
FLOAT32 = "the stream must be float32 or float64 everywhere: in half precision a fold would round the weights once more"


@dataclass
class Stream:
    """What was found from one norm; ``blocked`` is the sentence why it must not be rotated, or None."""

    values: set[fx.Node] = field(default_factory=set)
    writers: set[fx.Node] = field(default_factory=set)
    constants: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)  # (reader, constant)
    norms: set[fx.Node] = field(default_factory=set)
    readers: set[fx.Node] = field(default_factory=set)
    blocked: str | None = None

    @property
    def nodes(self) -> set[fx.Node]:
        return self.values | self.norms | self.readers

    def block(self, sentence: str, node: fx.Node) -> None:
        self.blocked = self.blocked or sentence.format(operator_name(node))


def rotate_streams(gm: fx.GraphModule) -> list[Event]:
    """Rotate every stream at a node of which a calibration handed over a rotation."""
    events: list[Event] = []
    for node in list(gm.graph.nodes):
        given = node.meta.get("fxquant_vectors", {}).pop(RULE.name, None)
        if given is None:
            continue
        stream = next((s for s in find_streams(gm.graph) if node in s.nodes), None)
        sentence = "no norm reads a stream at this site" if stream is None else _refusal(stream, given["rotation"])
        if stream is None or sentence is not None:
            events.append(Refused(RULE, node.name, str(sentence)))
            continue
        _rotate(stream, given["rotation"])
        events.append(Fired(RULE, node.name))
    gm.graph.lint()
    gm.recompile()
    return events


def find_streams(graph: fx.Graph) -> list[Stream]:
    """Every residual stream that a norm reads."""
    streams: list[Stream] = []
    for node in graph.nodes:
        if node.target in NORMS and not any(node in stream.norms for stream in streams):
            streams.append(_explore(node.args[0]))
    return streams


def _explore(start: Any) -> Stream:
    stream, pending = Stream(), [start]
    while pending:
        value = pending.pop()
        if value not in stream.values:
            stream.values.add(value)
            pending += _written_by(value, stream) + _read_by(value, stream)
    return stream


def _written_by(node: fx.Node, stream: Stream) -> list[fx.Node]:
    """Further values of the stream that a value is made of; a writer or a constant is noted."""
    name = operator_name(node)
    sources = _carried(node)
    if sources is not None:
        stream.constants |= {(node, source) for source in sources if _is_frozen(source)}
        return [source for source in sources if not _is_frozen(source)]
    weight = node.args[{"linear": 1, "embedding": 0}[name]] if name in ("linear", "embedding") else None
    if isinstance(weight, fx.Node) and _is_frozen(weight):
        stream.writers.add(node)
    else:
        stream.block(WRITER, node)
    return []


def _read_by(node: fx.Node, stream: Stream) -> list[fx.Node]:
    """Further values of the stream that read a value; a norm with its readers is noted."""
    found = []
    for user in node.users:
        if _carried(user) is not None:
            found.append(user)
        elif user.target in NORMS and user.args[0] is node:
            stream.norms.add(user)
            _note_readers(user, stream)
        else:
            stream.block(USER, user)
    return found


def _note_readers(node: fx.Node, stream: Stream) -> None:
    for user in node.users:
        sources = _carried(user)
        if operator_name(user) == "linear" and user.args[0] is node and _is_frozen(user.args[1]):
            stream.readers.add(user)
        elif sources == [node]:
            _note_readers(user, stream)
        else:
            stream.block(READER, user)


def _carried(node: fx.Node) -> list[fx.Node] | None:
    """The values whose channels a node carries on one by one: an add's, a view's, a concatenation's of tokens; or None."""
    name = operator_name(node)
    if name == "add":
        is_plain = all(isinstance(arg, fx.Node) for arg in node.args) and not node.kwargs
        return list(node.args) if is_plain and len(node.args) == 2 and have_one_width(*node.args, node) else None  # type: ignore[arg-type]
    if name == "cat" and isinstance(node.args[0], (list, tuple)):
        keeps = is_not_last(node, node.args[1] if len(node.args) > 1 else 0)
        return (
            [arg for arg in node.args[0] if isinstance(arg, fx.Node)] if keeps and have_one_width(*node.args[0], node) else None
        )
    source = carried(node)
    return None if source is None else [source]


def _refusal(stream: Stream, rotation: fx.Node) -> str | None:
    """Why a stream must not be rotated, or None."""
    if stream.blocked is not None:
        return stream.blocked
    if any(_argument(norm, name) is not None for norm in stream.norms for name in NORMS[norm.target]):  # type: ignore[index]
        return AFFINE
    value = next(iter(stream.norms)).args[0].meta["val"]  # type: ignore[union-attr]
    matrix, width = rotation.meta["val"], value.shape[-1]
    weights = [weight for node in (*stream.writers, *stream.readers) for weight in _weights(node)]
    dtypes = {weight.meta["val"].dtype for weight in weights} | {node.meta["val"].dtype for node in stream.nodes}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        return FLOAT32
    if tuple(map(str, matrix.shape)) != (str(width), str(width)) or matrix.dtype not in dtypes:
        return SQUARE
    if not is_orthogonal(rotation.meta.get("fxquant_value")):
        return ORTHOGONAL
    inside = stream.nodes
    return UNTIED if any(user not in inside for weight in weights for user in weight.users) or _overlap(stream) else None


def _overlap(stream: Stream) -> bool:
    """Whether two operators of the stream read one weight: a tied embedding, a layer that is run twice."""
    nodes = [*stream.writers, *stream.readers]
    weights = [weight for node in nodes for weight in _weights(node)]
    return len(set(weights)) != len(weights) or not stream.readers.isdisjoint(stream.writers)


def _rotate(stream: Stream, rotation: fx.Node) -> None:
    has_means = any(norm.target is aten.layer_norm.default for norm in stream.norms)
    by_row, by_column = (centred_rows, centred_columns) if has_means else (rows, columns)
    for node in stream.writers:
        is_linear = operator_name(node) == "linear"
        _change(node, "weight", rotation, by_row if is_linear else by_column)
        if is_linear:
            _change(node, "bias", rotation, by_column)
    for reader, constant in stream.constants:
        reader.replace_input_with(constant, write_value(by_column, (constant, rotation), reader, RULE.name))
    for node in stream.readers:
        _change(node, "weight", rotation, columns)
    for norm in stream.norms:
        if norm.target is aten.layer_norm.default:
            _without_mean(norm)


def _without_mean(norm: fx.Node) -> None:
    """LayerNorm of rows whose mean is zero is RMSNorm."""
    size, eps = norm.args[1], _argument(norm, "eps")
    norm.args, norm.kwargs = (norm.args[0], size, None, 1e-5 if eps is None else eps), {}
    norm.target = aten.rms_norm.default


def _change(node: fx.Node, argument: str, rotation: fx.Node, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    old = _argument(node, argument)
    if old is not None:
        set_argument(Place(node, argument), write_value(function, (old, rotation), node, RULE.name))


def _weights(node: fx.Node) -> list[fx.Node]:
    found = [_argument(node, name) for name in ("weight", "bias")]
    return [weight for weight in found if isinstance(weight, fx.Node)]


def _argument(node: fx.Node, name: str) -> Any:
    if not isinstance(node.target, torch._ops.OpOverload):
        raise RuleError(f"{node.name} is no ATen operator")
    names = [argument.name for argument in node.target._schema.arguments]
    index = names.index(name) if name in names else len(node.args)
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _is_frozen(node: Any) -> bool:
    return isinstance(node, fx.Node) and bool(node.meta.get("fxquant_frozen", False))
