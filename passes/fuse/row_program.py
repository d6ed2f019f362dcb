"""One group of row-wise nodes → the arguments of fxquant::rows: registers by liveness, instructions in graph order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxquant.ops import FIELDS, Op
from fxquant.passes.fuse.row_nodes import is_alias, is_vector_for, row_operands, width_of

aten = torch.ops.aten


class Refusal(Exception):
    """Why a group cannot become one row program."""


@dataclass
class RowProgram:
    """The arguments of fxquant::rows, with nodes for tensors. ``results`` are the values that become its outputs."""

    results: Sequence[fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)
    packed: list[fx.Node] = field(default_factory=list)
    params: list[fx.Node] = field(default_factory=list)
    registers: list[int] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def arguments(self) -> tuple[object, ...]:
        """In the order of the schema."""
        lists = (self.inputs, self.packed, self.params, self.registers, self.code, self.constants, self.outputs)
        return tuple(list(values) for values in lists)

    def row_bytes(self) -> int:
        """Scratch memory of one row, about: the registers that are neither input nor output, and the widest codes."""
        held = set(self.outputs[::2])
        floats = sum(w for r, w in enumerate(self.registers[::2]) if self.registers[2 * r + 1] < 0 and r not in held)
        linears = [self.code[i : i + FIELDS] for i in range(0, len(self.code), FIELDS)]
        widest = max((self.registers[2 * it[2]] for it in linears if it[0] in (Op.LINEAR, Op.LINEAR_STATIC)), default=0)
        return 4 * floats + widest

    def register(self, width: int, place: int = -1) -> int:
        """A new register."""
        self.registers += [width, place]
        return len(self.registers) // 2 - 1


def write_program(group: Sequence[fx.Node], results: Sequence[fx.Node]) -> RowProgram:
    """The program of a group in graph order; ``results`` are those of its values that are read outside.

    Raises:
        Refusal: an output has leading sizes that no input has.
    """
    program = RowProgram(results)
    members = set(group)
    compute = [node for node in group if not is_alias(node)]
    reads = {node: [_root(operand, members) for operand in row_operands(node)] for node in compute}
    last = {operand: i for i, node in enumerate(compute) for operand in reads[node]}
    held: dict[fx.Node, int] = {}
    for node in compute:
        for operand in reads[node]:
            if operand not in members and operand not in held:
                held[operand] = program.register(width_of(operand), len(program.inputs))
                program.inputs.append(operand)
    for node in results:
        held[node] = program.register(width_of(node))
        program.outputs += [held[node], _same_lead(node, program.inputs)]
    free: dict[int, list[int]] = {}
    for i, node in enumerate(compute):
        for operand in dict.fromkeys(reads[node]):
            if operand in members and operand not in results and last[operand] == i:
                free.setdefault(width_of(operand), []).append(held[operand])
        if node not in held:
            spare = free.get(width_of(node))
            held[node] = spare.pop() if spare else program.register(width_of(node))
        program.code += _instruction(node, program, held, reads[node])
    return program


def _root(node: fx.Node, members: set[fx.Node]) -> fx.Node:
    """The value behind views inside the group."""
    while node in members and is_alias(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _same_lead(node: fx.Node, inputs: Sequence[fx.Node]) -> int:
    lead = [str(size) for size in node.meta["val"].shape[:-1]]
    for place, value in enumerate(inputs):
        if [str(size) for size in value.meta["val"].shape[:-1]] == lead:
            return place
    raise Refusal("no input has the leading sizes of an output")


def _instruction(node: fx.Node, program: RowProgram, held: Mapping[fx.Node, int], reads: Sequence[fx.Node]) -> list[int]:
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    dst, a = held[node], held[reads[0]]
    if packet == torch.ops.fxquant.linear_dynamic:
        _, packed, bias, _, weight_bits, act_bits = node.args
        assert isinstance(packed, fx.Node)
        bits = (int(weight_bits), int(act_bits))  # type: ignore[arg-type]
        return [Op.LINEAR, dst, a, _index(program.packed, packed), _vector(program, bias), *bits]
    if packet == torch.ops.fxquant.linear_static:
        _, packed, bias, steps, zero_point, _, _, act_bits = node.args
        assert isinstance(packed, fx.Node)
        at = _vector(program, steps)
        assert _vector(program, zero_point) == at + 1  # both are read by linears of this slot only, always together
        return [Op.LINEAR_STATIC, dst, a, _index(program.packed, packed), _vector(program, bias), at, int(act_bits)]  # type: ignore[arg-type]
    if packet == aten.layer_norm:
        weight, bias = (*node.args, None, None)[2:4]
        eps = node.args[4] if len(node.args) > 4 else node.kwargs.get("eps", 1e-5)
        norm = (_vector(program, weight), _vector(program, bias), _constant(program, eps))
        return [Op.LAYER_NORM, dst, a, 0, *norm]
    if packet == aten.rms_norm:
        weight, eps = (*node.args, None, None)[2:4]
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        return [Op.RMS_NORM, dst, a, 0, _vector(program, weight), -1, _constant(program, eps)]
    if packet == aten.gelu:
        op = Op.GELU_TANH if node.kwargs.get("approximate") == "tanh" else Op.GELU_ERF
        return [op, dst, a, 0, -1, -1, -1]
    if packet == torch.ops.fxquant.gelu:
        return [Op.GELU_TANH if node.args[1] else Op.GELU_ERF, dst, a, 0, -1, -1, -1]
    if packet in (aten.silu, aten.relu):
        return [Op.SILU if packet == aten.silu else Op.RELU, dst, a, 0, -1, -1, -1]
    is_add = packet == aten.add
    if len(reads) == 2:
        return [Op.ADD if is_add else Op.MUL, dst, a, held[reads[1]], -1, -1, -1]
    vector = next(arg for arg in node.args[:2] if isinstance(arg, fx.Node) and is_vector_for(arg, node))
    return [Op.ADD_ROW if is_add else Op.MUL_ROW, dst, a, 0, _vector(program, vector), -1, -1]


def _vector(program: RowProgram, node: object) -> int:
    return _index(program.params, node) if isinstance(node, fx.Node) else -1


def _constant(program: RowProgram, value: object) -> int:
    assert isinstance(value, (int, float))
    if float(value) not in program.constants:
        program.constants.append(float(value))
    return program.constants.index(float(value))


def _index(nodes: list[fx.Node], node: fx.Node) -> int:
    if node not in nodes:
        nodes.append(node)
    return nodes.index(node)
