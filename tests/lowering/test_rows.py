"""Row programs: every instruction set, thread count and strategy gives the bits of the reference."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fxquant import reference
from fxquant.config import ISAS
from fxquant.lowering.pack import pack_linear
from fxquant.ops import Op
from fxquant.reference import rows as meaning
from fxquant.schemes import SCHEMES, Scheme
from fxquant.testing.kernels import LEVELS, at_most

W8A7, W8A8, W7A7 = (SCHEMES[name] for name in ("w8a7", "w8a8", "w7a7"))


@dataclass
class Program:
    """A row program written by hand: every value in a register of its own."""

    inputs: list[Tensor]
    registers: list[int] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    weights: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    packed: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for place, tensor in enumerate(self.inputs):
            self.registers += [tensor.shape[-1], place]

    def linear(self, a: int, n: int, scheme: Scheme = W8A7, bias: bool = True) -> int:
        k = self.width(a)
        weight = torch.randn(n, k) / math.sqrt(k)
        self.weights.append(reference.quantize_weight(weight, scheme.weight_bits))
        self.packed.append(pack_linear(weight, scheme))
        vector = self.vector(n) if bias else -1
        return self.add(Op.LINEAR, n, a, len(self.packed) - 1, vector, scheme.weight_bits, scheme.act_bits)

    def static(self, a: int, n: int, scheme: Scheme = W8A7) -> int:
        k = self.width(a)
        steps = torch.rand(k) / 10 + 0.01
        weight = torch.randn(n, k) / math.sqrt(k) * steps
        self.weights.append(reference.quantize_weight(weight, scheme.weight_bits))
        self.packed.append(pack_linear(weight, scheme))
        at = self.vector(n)
        self.params += [steps, torch.tensor([40], dtype=torch.int32)]
        return self.add(Op.LINEAR_STATIC, n, a, len(self.packed) - 1, at, at + 1, scheme.act_bits)

    def norm(self, op: Op, a: int, weight: bool = True, bias: bool = True) -> int:
        self.constants.append(1e-5)
        n = self.width(a)
        return self.add(op, n, a, 0, self.vector(n) if weight else -1, self.vector(n) if bias else -1, len(self.constants) - 1)

    def row(self, op: Op, a: int) -> int:
        return self.add(op, self.width(a), a, 0, self.vector(self.width(a)))

    def each(self, op: Op, a: int, b: int = 0) -> int:
        return self.add(op, self.width(a), a, b)

    def add(self, op: Op, width: int, a: int, b: int, first: int = -1, second: int = -1, third: int = -1) -> int:
        self.registers += [width, -1]
        dst = len(self.registers) // 2 - 1
        self.code += [op, dst, a, b, first, second, third]
        return dst

    def vector(self, n: int) -> int:
        self.params.append(torch.randn(n))
        return len(self.params) - 1

    def width(self, reg: int) -> int:
        return self.registers[2 * reg]

    def out(self, *registers: int, like: int = 0) -> "Program":
        self.outputs += [part for reg in registers for part in (reg, like)]
        return self

    def run(self) -> list[Tensor]:
        made: list[Tensor] = torch.ops.fxquant.rows(
            self.inputs, self.packed, self.params, self.registers, self.code, self.constants, self.outputs
        )
        return made

    def wanted(self) -> list[Tensor]:
        return meaning.rows(self.inputs, self.weights, self.params, self.registers, self.code, self.constants, self.outputs)


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def memory_filled_with_nan() -> Iterator[None]:
    """Every new tensor starts as NaN, so that a hole in an output shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same(program: Program) -> None:
    wanted = program.wanted()
    for isa in LEVELS:
        for threads in (1, 2):
            with at_most(isa), with_threads(threads), memory_filled_with_nan():
                got = program.run()
            for k, (a, b) in enumerate(zip(got, wanted, strict=True)):
                place = f"{ISAS[isa]}, {threads} threads, output {k}"
                assert a.shape == b.shape, place
                assert torch.equal(a.isnan(), b.isnan()), f"{place}: NaN"
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{place}: {(a - b).abs().max()}"


def feed_forward(x: Tensor, hidden: int, scheme: Scheme) -> Program:
    p = Program([x])
    return p.out(p.linear(p.each(Op.GELU_ERF, p.linear(0, hidden, scheme)), x.shape[-1], scheme))


def encoder_half(attention: Tensor, residual: Tensor, hidden: int, scheme: Scheme) -> Program:
    """Out-projection, add, norm, feed-forward, add, norm, q, k, v: what stands between two attentions."""
    p = Program([attention, residual])
    n = residual.shape[-1]
    x = p.norm(Op.LAYER_NORM, p.each(Op.ADD, p.linear(0, n, scheme), 1))
    y = p.linear(p.each(Op.GELU_TANH, p.linear(x, hidden, scheme)), n, scheme)
    stream = p.norm(Op.LAYER_NORM, p.each(Op.ADD, y, x))
    return p.out(stream, *(p.linear(stream, n, scheme) for _ in range(3)))


def swiglu(x: Tensor, hidden: int, scheme: Scheme) -> Program:
    p = Program([x])
    y = p.norm(Op.RMS_NORM, 0, bias=False)
    gate = p.each(Op.SILU, p.linear(y, hidden, scheme, bias=False))
    return p.out(p.each(Op.ADD, p.linear(p.each(Op.MUL, gate, p.linear(y, hidden, scheme)), x.shape[-1], scheme), 0))


MAKERS: dict[str, Callable[[Tensor, int, Scheme], Program]] = {
    "feed-forward": feed_forward,
    "encoder": lambda x, hidden, scheme: encoder_half(x, torch.randn(x.shape), hidden, scheme),
    "swiglu": swiglu,
}
# rows x width x hidden: one element; ragged everything; columns shared by threads; one block; many blocks
SHAPES = [(1, 1, 1), (3, 17, 5), (7, 40, 100), (15, 33, 70), (16, 64, 96), (37, 100, 65), (128, 48, 130), (400, 384, 640)]


# One scheme is enough for the last shape, whose reference is slow.
CASES = [(shape, scheme) for shape in SHAPES for scheme in (W8A7, W8A8, W7A7) if shape != SHAPES[-1] or scheme == W8A7]


@pytest.mark.parametrize(("shape", "scheme"), CASES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_programs(name: str, shape: tuple[int, int, int], scheme: Scheme) -> None:
    m, k, hidden = shape
    assert_same(MAKERS[name](torch.randn(m, k), hidden, scheme))


ELEMENTWISE = [Op.GELU_ERF, Op.GELU_TANH, Op.SILU, Op.RELU]


@pytest.mark.parametrize("op", ELEMENTWISE, ids=lambda op: op.name)
def test_activations_on_every_kind_of_number(op: Op) -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 3e38, -3e38, 5.6, -5.6, 87.0, -88.0])
    x = torch.cat([special, torch.linspace(-120, 120, 5000), torch.linspace(-6, 6, 5000)])
    p = Program([x.reshape(1, -1)])
    assert_same(p.out(p.each(op, 0)))


@pytest.mark.parametrize(
    ("op", "exact", "bound"),
    [
        (Op.GELU_ERF, lambda x: torch.nn.functional.gelu(x), 2e-7),
        (Op.GELU_TANH, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), 5e-7),
        (Op.SILU, torch.nn.functional.silu, 2e-7),
    ],
    ids=["gelu", "gelu tanh", "silu"],
)
def test_activations_are_as_close_to_float64_as_is_said(op: Op, exact: Callable[[Tensor], Tensor], bound: float) -> None:
    x = torch.linspace(-20, 20, 400_001)
    p = Program([x.reshape(1, -1)])
    (got,) = p.out(p.each(op, 0)).run()
    wanted = exact(x.double())
    assert ((got[0].double() - wanted).abs() / wanted.abs().clamp_min(1)).max() <= bound


@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 48, 100, 384, 1000])
@pytest.mark.parametrize("op", [Op.LAYER_NORM, Op.RMS_NORM], ids=lambda op: op.name)
@pytest.mark.parametrize("weight", [True, False])
def test_norms(op: Op, width: int, weight: bool) -> None:
    x = (torch.randn(11, width) + 1) * torch.logspace(-3, 3, 11)[:, None]
    x[3] = 0
    x[5, 0] = math.nan
    x[7, -1] = math.inf
    p = Program([x])
    program = p.out(p.norm(op, 0, weight, weight and op == Op.LAYER_NORM))
    assert_same(program)
    f = torch.nn.functional
    exact = x[[0, 1, 2, 4, 6, 8, 9, 10]].double()
    given: Sequence[Tensor] = [v.double() for v in program.params]
    if op == Op.LAYER_NORM:
        wanted = f.layer_norm(exact, (width,), given[0] if given else None, given[1] if given else None, 1e-5)
    else:
        wanted = f.rms_norm(exact, (width,), given[0] if given else None, 1e-5)
    assert torch.allclose(program.run()[0][[0, 1, 2, 4, 6, 8, 9, 10]].double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scheme", [W8A7, W8A8, SCHEMES["w6a6"]], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 60])
def test_static_linears_beside_dynamic_ones(rows: int, scheme: Scheme) -> None:
    """Three linears read one register with steps of their own, and one of them without: nobody takes another's codes."""
    x = torch.randn(rows, 41)
    x[0, 3] = math.nan if rows > 1 else 0.0
    p = Program([x])
    y = p.norm(Op.LAYER_NORM, 0)
    hidden = p.each(Op.GELU_ERF, p.static(y, 70, scheme))
    assert_same(p.out(p.static(y, 33, scheme), p.linear(y, 20, scheme), p.static(hidden, 41, scheme), p.static(y, 16, W8A8)))


def test_bad_static_qparams_are_refused() -> None:
    p = Program([torch.randn(4, 20)])
    p.out(p.static(0, 30))
    p.run()
    for place, value, message in (
        (1, torch.zeros(20), "step 0 is no positive normal number"),
        (1, torch.ones(19), "must have 20 float32 values"),
        (2, torch.tensor([128], dtype=torch.int32), "zero point 128 does not fit 7 bits"),
        (2, torch.ones(1), "followed by an int32 zero point"),
    ):
        params = [*p.params]
        params[place] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fxquant.rows(p.inputs, p.packed, params, p.registers, p.code, p.constants, p.outputs)


@pytest.mark.parametrize("rows", [5, 60])
def test_rows_that_are_zero_or_not_finite_stay_by_themselves(rows: int) -> None:
    x = torch.randn(rows, 40)
    x[0] = 0
    x[2, 3] = math.nan
    x[4, 0] = math.inf
    program = encoder_half(x, torch.randn(rows, 40), 64, W8A8)
    assert_same(program)
    for out in program.run():
        assert out.isnan().any(1).nonzero().flatten().tolist() == [2, 4]


@pytest.mark.parametrize("rows", [3, 50])
def test_vectors_for_every_row_and_registers_that_are_reused(rows: int) -> None:
    p = Program([torch.randn(2, rows, 24), torch.randn(2, rows, 24)])
    x = p.row(Op.MUL_ROW, p.row(Op.ADD_ROW, p.linear(0, 24)))
    p.code += [Op.ADD, x, x, 1, -1, -1, -1]  # in place
    p.code += [Op.RELU, x, x, 0, -1, -1, -1]
    y = p.linear(x, 40)
    p.code += [Op.ADD, x, x, x, -1, -1, -1]  # the register changes: its codes must not be used again
    assert_same(p.out(y, p.linear(x, 24), x, like=1))


def test_linears_of_different_widths_read_one_register() -> None:
    p = Program([torch.randn(50, 72)])
    x = p.row(Op.ADD_ROW, 0)
    assert_same(p.out(*(p.linear(x, n, scheme) for n, scheme in ((30, W8A8), (40, W8A7), (30, W8A8), (16, W7A7)))))


def test_batches_strides_and_empty_batches() -> None:
    strided = torch.randn(2, 20, 9).transpose(1, 2)
    assert_same(encoder_half(strided, torch.randn(2, 9, 20), 30, W8A7))
    empty = feed_forward(torch.empty(0, 3, 20), 30, W8A7).run()
    assert [tuple(t.shape) for t in empty] == [(0, 3, 20)]


def bad(**changes: object) -> dict[str, object]:
    p = feed_forward(torch.randn(4, 20), 30, W8A7)
    given = {
        "inputs": p.inputs, "packed": p.packed, "params": p.params, "registers": p.registers, "program": p.code,
        "constants": p.constants, "outputs": p.outputs,
    }  # fmt: skip
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": [torch.randn(4, 20).double()]}, "must be float32"),
        ({"inputs": [torch.randn(4, 21)]}, "has 21 columns"),
        ({"packed": [torch.zeros(64, dtype=torch.uint8)] * 2}, "no packed weight"),
        ({"program": [Op.RELU, 9, 0, 0, -1, -1, -1]}, "9 is out of range"),
        ({"program": [99, 1, 0, 0, -1, -1, -1]}, "99 is out of range"),
        ({"program": [Op.RELU, 0, 0, 0, -1, -1, -1]}, "an input is written"),
        ({"program": [Op.RELU, 1, 0, 0, -1, -1, -1]}, "20 columns become 30"),
        ({"program": [Op.LINEAR, 1, 0, 0, -1, 8, 8]}, "the program asks for w8a8"),
        ({"program": [1, 2, 3]}, "bad program"),
        ({"outputs": [0, 0]}, "a register of its own"),
    ],
)
def test_a_bad_program_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fxquant.rows(**bad(**changes))


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
def test_the_operator_is_a_good_citizen(test: str) -> None:
    p = encoder_half(torch.randn(2, 5, 20), torch.randn(2, 5, 20), 30, W8A7)
    args = (p.inputs, p.packed, p.params, p.registers, p.code, p.constants, p.outputs)
    torch.library.opcheck(torch.ops.fxquant.rows, args, test_utils=test)
