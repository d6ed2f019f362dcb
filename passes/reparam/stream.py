"""The residual stream of a graph: every value that adds join, with all that writes it and all that reads it.

The rule ``rotation`` says what is done to each writer and reader; here stands for which graphs all of them are known. What
cannot take up R stays as it is, and the stream is turned at run time beside it: x R behind a writer (an embedding whose weight
the head shares, a convolution), x Rᵀ before a reader (the norm of a tied head), as long as that costs little.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import ENTER_AUTOCAST, maybe_fake_mode
from fxquant.errors import RuleError
from fxquant.passes.channels import carried, have_one_width, is_not_last, operator_name
from fxquant.passes.reparam.legality import UNTIED
from fxquant.passes.reparam.rotation import (
    ORTHOGONAL,
    RULE,
    SQUARE,
    centred_columns,
    centred_rows,
    centred_turn,
    columns,
    is_orthogonal,
    rows,
    turn,
    turn_back,
)
from fxquant.passes.reweight import Place, set_argument, write_value
from fxquant.passes.rule import Event, Fired, Refused

aten = torch.ops.aten
NORMS = {aten.layer_norm.default: ("weight", "bias"), aten.rms_norm.default: ("weight",)}
NO_STREAM = "no norm reads a stream here"
AFFINE = "a norm on the stream has γ or β: fold them into the linears first (norm_affine)"
MATRIX = "a norm on the stream must span its channels alone"
READER = "the norm of a stream must be read by linears alone, and {} reads it"
WRITER = "the stream must be made of linears, embeddings and constants, and {} writes it"
USER = "the stream must be read by norms alone, and {} reads it"
MEANS = "a LayerNorm's stream has its mean taken off, and {} needs it"
FLOAT32 = "the stream must be float32 or float64 everywhere: in half precision a fold would round the weights once more"
IN_PLACE = "an in-place operator runs in this graph, so no value of it may be turned at run time"
COSTLY = "; turning the stream there at run time would cost too much beside its linears"
MOST_TURNS = 1 / 16  # of the multiplications of the stream's linears may be spent on turning it at run time


@dataclass
class Stream:
    """What was found from one norm: ``norms`` and ``readers`` take up R, as ``writers`` and ``constants`` do.

    ``enters`` are values that are turned at run time, ``leaves`` (value, reader) what reads a value as it was; each with the
    sentence why. ``around`` are all norms with what reads them.
    """

    values: set[fx.Node] = field(default_factory=set)
    writers: set[fx.Node] = field(default_factory=set)
    constants: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)  # (reader, constant)
    norms: set[fx.Node] = field(default_factory=set)
    readers: set[fx.Node] = field(default_factory=set)
    enters: dict[fx.Node, str] = field(default_factory=dict)
    leaves: dict[tuple[fx.Node, fx.Node], str] = field(default_factory=dict)
    around: set[fx.Node] = field(default_factory=set)

    @property
    def has_means(self) -> bool:
        """Whether a LayerNorm reads it, for which its mean is taken off."""
        return any(norm.target is aten.layer_norm.default for norm in self.norms)

    @property
    def returned(self) -> dict[fx.Node, list[fx.Node]]:
        """Value → who reads it turned back; a value that enters is still there as it was."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for value, reader in self.leaves:
            if value not in self.enters:
                found.setdefault(value, []).append(reader)
        return found

    @property
    def width(self) -> Any:
        """The number of channels."""
        return next(iter(self.values)).meta["val"].shape[-1]


def rotate_streams(gm: fx.GraphModule) -> list[Event]:
    """Rotate every stream at a node of which a calibration handed over a rotation."""
    events: list[Event] = []
    for node in list(gm.graph.nodes):
        given = node.meta.get("fxquant_vectors", {}).pop(RULE.name, None)
        if given is None:
            continue
        stream = next((s for s in find_streams(gm.graph) if node in s.values | s.around), None)
        sentence = NO_STREAM if stream is None else refusal(stream) or _misfit(stream, given["rotation"])
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
        is_known = any(node.args[0] in stream.values for stream in streams) if node.target in NORMS else True
        if not is_known and "val" in node.meta:
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
    sources = _carried(node)
    if sources is not None:
        stream.constants |= {(node, source) for source in sources if _is_frozen(source)}
        return [source for source in sources if not _is_frozen(source)]
    sentence = _unfit(node, WRITER, ("linear", "embedding"))
    if sentence is None:
        stream.writers.add(node)
    else:
        stream.enters[node] = sentence
    return []


def _read_by(node: fx.Node, stream: Stream) -> list[fx.Node]:
    """Further values of the stream that read a value; a norm with its readers is noted."""
    found = []
    for user in node.users:
        if _carried(user) is not None:
            found.append(user)
        elif user.target in NORMS and user.args[0] is node:
            _note_norm(user, stream)
        else:
            stream.leaves[node, user] = USER.format(operator_name(user))
    return found


def _note_norm(norm: fx.Node, stream: Stream) -> None:
    readers, pending, sentences = set[fx.Node](), [norm], list[str]()
    while pending:
        value = pending.pop()
        stream.around |= {value, *value.users}
        for user in value.users:
            if _carried(user) == [value]:
                pending.append(user)
            elif (sentence := _unfit(user, READER, ("linear",) if user.args[0] is value else ())) is None:
                readers.add(user)
            else:
                sentences.append(sentence)
    if any(_argument(norm, name) is not None for name in NORMS[norm.target]):  # type: ignore[index]
        sentences.append(AFFINE)
    if len(norm.args[1]) != 1:  # type: ignore[arg-type]
        sentences.append(MATRIX)
    if sentences:
        stream.leaves[norm.all_input_nodes[0], norm] = sentences[0]
    else:
        stream.norms.add(norm)
        stream.readers |= readers


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


def _unfit(node: fx.Node, sentence: str, operators: tuple[str, ...]) -> str | None:
    """Why the weights of a writer or reader cannot take up R, or None."""
    weights = _weights(node) if operator_name(node) in operators else []
    if not weights or not all(map(_is_frozen, weights)):
        return sentence.format(operator_name(node))
    return UNTIED if any(len(weight.users) > 1 for weight in weights) else None


def refusal(stream: Stream) -> str | None:
    """Why a stream must not be rotated by whatever matrix, or None."""
    graph = next(iter(stream.values)).graph
    weights = {node: _weights(node) for node in (*stream.writers, *stream.readers)}
    read = [*stream.values, *stream.norms, *stream.readers, *(weight for held in weights.values() for weight in held)]
    is_cast = any(node.args[2] for node in graph.find_nodes(op="call_function", target=ENTER_AUTOCAST))
    if is_cast or {node.meta["val"].dtype for node in read} not in ({torch.float32}, {torch.float64}):
        return FLOAT32
    sentences = [*stream.leaves.values(), *stream.enters.values()]
    turns = (len(stream.enters) + len(stream.returned)) * stream.width**2
    linears = sum(held[0].meta["val"].numel() for node, held in weights.items() if operator_name(node) == "linear")
    if sentences and turns > MOST_TURNS * linears:
        return sentences[0] + COSTLY
    if sentences and any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in graph.nodes):
        return IN_PLACE
    needing = [*stream.norms, *(reader for found in stream.returned.values() for reader in found)]
    others = [node for node in needing if node.target is not aten.layer_norm.default]
    return MEANS.format(operator_name(others[0])) if stream.has_means and others else None


def _misfit(stream: Stream, rotation: fx.Node) -> str | None:
    """Why a matrix does not fit a stream, or None."""
    matrix, value = rotation.meta["val"], next(iter(stream.values)).meta["val"]
    if tuple(map(str, matrix.shape)) != (str(stream.width),) * 2 or matrix.dtype != value.dtype:
        return SQUARE
    return None if is_orthogonal(rotation.meta.get("fxquant_value")) else ORTHOGONAL


def _rotate(stream: Stream, rotation: fx.Node) -> None:
    centred = stream.has_means
    by_row, by_column = (centred_rows, centred_columns) if centred else (rows, columns)
    for value in stream.enters:
        inside = [user for user in value.users if (value, user) not in stream.leaves]
        _turn(value, centred_turn if centred else turn, rotation, inside)
    for value, outside in stream.returned.items():
        _turn(value, turn_back, rotation, outside)
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


def _turn(value: fx.Node, function: Callable[[Tensor], Tensor], rotation: fx.Node, readers: list[fx.Node]) -> None:
    """Give readers a value turned at run time."""
    first = min(readers)
    matrix = write_value(function, (rotation,), first, RULE.name)
    with value.graph.inserting_before(first):
        turned = value.graph.call_function(aten.matmul.default, (value, matrix))
    turned.meta = {key: held for key, held in value.meta.items() if key != "fxquant_vectors"}
    with maybe_fake_mode([value.meta["val"]]):
        turned.meta["val"] = torch.empty_like(value.meta["val"], memory_format=torch.contiguous_format)
    turned.meta["fxquant"] = {"rule": RULE.name}
    for reader in readers:
        reader.replace_input_with(value, turned)


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
    """The weight, and the bias where there is one."""
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
