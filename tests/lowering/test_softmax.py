"""Every form of softmax on every instruction set against float64: closeness, edge cases, and the same bits on any threads."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.config import ISAS
from fxquant.lowering.cpu.build import library_path
from fxquant.ops import BLOCKED, THREE_PASS, TWO_PASS
from fxquant.reference.softmax import extended_exp, softmax, sum_pairs
from fxquant.testing.kernels import LEVELS, at_most

FORMS = (THREE_PASS, TWO_PASS, BLOCKED)
INF, NAN = math.inf, math.nan
every_isa = pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: str(ISAS[isa]))


def run(x: Tensor, form: int, log: bool = False) -> Tensor:
    out = torch.full(x.shape, NAN)  # a hole would show
    torch.ops.fxquant.softmax_into(x, log, form, out)
    return out


@every_isa
def test_exp_is_within_two_ulp(isa: int) -> None:
    x = torch.cat([torch.linspace(-87.3, 88.3, 2_000_003), torch.linspace(-1e-3, 1e-3, 100_001), torch.randn(200_000) * 3])
    y = torch.empty_like(x)
    with at_most(isa) as library:
        library.fxquant_exp(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    exact = torch.exp(x.double())
    ulp = torch.nextafter(exact.float(), torch.tensor(INF)).double() - exact.float().double()
    assert ((y.double() - exact).abs() / ulp).max() <= 2.0


@every_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 33, 95, 97, 1000, 2049, 4096, 70_000, 1 << 18])
def test_close_to_float64(n: int, form: int, isa: int) -> None:
    for x in (torch.randn(2, n), torch.randn(2, n) * 16, torch.rand(2, n) * 2000 - 1000, torch.full((2, n), 3.0)):
        wanted = torch.softmax(x.double(), -1)
        with at_most(isa):
            y = run(x, form)
        # x - max rounds to a few 2^-19 where values are some tens apart; (mantissa, exponent) pairs do not subtract.
        close = 5e-7 if form == TWO_PASS else 1e-5
        assert torch.allclose(y.double(), wanted, rtol=close, atol=2e-38)
        assert (y.double().sum(-1) - 1).abs().max() <= 1e-6


@every_isa
@pytest.mark.parametrize("form", [THREE_PASS, BLOCKED])
@pytest.mark.parametrize("n", [1, 17, 4096, 70_000])
def test_log_softmax_is_close_to_float64(n: int, form: int, isa: int) -> None:
    for x in (torch.randn(2, n), torch.randn(2, n) * 300 + 1000):
        with at_most(isa):
            y = run(x, form, log=True)
        assert torch.allclose(y.double(), torch.log_softmax(x.double(), -1), rtol=3e-7, atol=3e-7)


EDGES = {
    "-inf gives 0": [1.0, -INF, 2.0],
    "all -inf": [-INF] * 3,
    "+inf": [1.0, INF, -INF],
    "nan": [0.0, NAN, -INF],
    "nan beside -inf alone": [-INF, NAN, -INF],
    "lowest float": [torch.finfo(torch.float32).min, 0.0, 1.0],
    "all lowest": [torch.finfo(torch.float32).min] * 3,
    "huge spread": [3e38, -3e38, 0.0],
    "huge": [1e30, 1e30, -1e30],
    "far below": [-2e5, -3e5, -2e5],
    "nearly 0": [0.0, -87.0, -104.0],
}


@every_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [3, 40, 70_001])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_torchs_and_stay_in_their_row(edge: str, length: int, form: int, isa: int) -> None:
    x = torch.full((3, length), -INF)
    x[1, :3] = torch.tensor(EDGES[edge])
    x[0], x[2] = torch.randn(length), torch.randn(length)
    for log in (False, True) if form != TWO_PASS else (False,):
        wanted = torch.log_softmax(x, -1) if log else torch.softmax(x, -1)
        with at_most(isa):
            y = run(x, form, log)
        assert torch.equal(y.isnan(), wanted.isnan())
        assert torch.equal(y == -INF, wanted == -INF)
        assert torch.allclose(y, wanted, rtol=2e-5, atol=2e-5 if log else 2e-38, equal_nan=True)
        if edge == "-inf gives 0" and not log:
            assert y[1, 1] == 0


@every_isa
def test_worked_examples(isa: int) -> None:
    examples = {
        (1000.0, 999.0, 998.0): ((1.21679986, 1443), (0.665240943, 0.244728476, 0.0900305733)),
        (0.0, 0.5, 1.0): ((2.68350172, 1), (0.186323717, 0.307195842, 0.506480396)),
        (-1000.0, -1001.0, -1000.5): ((2.43915391, -1443), (0.506480396, 0.186323717, 0.307195902)),
        (88.8, 89.0, -200.0): ((2.39959788, 128), (0.450166732, 0.549833238, 0.0)),
        (1000.0, 0.0, -1000.0): (None, (1.0, 0.0, 0.0)),
    }
    for row, (pair, wanted) in examples.items():
        x = torch.tensor(row)
        if pair is not None:
            total, top = sum_pairs(*extended_exp(x))
            assert top.item() == pair[1]
            assert total.item() == pytest.approx(pair[0], rel=5e-7)
        with at_most(isa):
            for form in FORMS:
                assert torch.allclose(run(x, form), torch.tensor(wanted), rtol=3e-7, atol=1e-38)
        assert torch.allclose(softmax(x), torch.tensor(wanted), rtol=3e-7, atol=1e-38)


@every_isa
def test_two_pass_is_shift_invariant_and_accurate_on_a_wide_row(isa: int) -> None:
    x = (torch.rand(4, 4096) * 2000 - 1000).round()  # whole numbers: the shift itself is exact
    with at_most(isa):
        y, moved = run(x, TWO_PASS), run(x + 4096.0, TWO_PASS)
    wanted = torch.softmax(x.double(), -1)
    seen = wanted > 1e-30
    assert ((y - wanted).abs() / wanted)[seen].max() <= 5e-7
    assert torch.allclose(moved, y, rtol=5e-6, atol=1e-37)


@pytest.mark.parametrize("form", [TWO_PASS, BLOCKED])
def test_a_long_row_has_the_same_bits_on_any_number_of_threads(form: int) -> None:
    x, before, results = torch.randn(1, 1_000_003) * 4, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x, form))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_row_of_millions_is_summed_in_blocks() -> None:
    x = torch.zeros(1, 1 << 22)
    for form in FORMS:
        assert torch.equal(run(x, form), torch.full_like(x, 2.0**-22))


def test_the_table_of_forms() -> None:
    form = ctypes.CDLL(str(library_path())).fxquant_softmax_form
    assert [form(ctypes.c_int64(n)) for n in (1, 4096, 32768, 1 << 19)] == [THREE_PASS] * 4
    assert [form(ctypes.c_int64(n)) for n in ((1 << 19) + 1, 1 << 22)] == [BLOCKED] * 2


def test_shapes_and_strides() -> None:
    op = torch.ops.fxquant.softmax
    for x in (torch.randn(5), torch.randn(2, 3, 4, 9), torch.randn(9, 6).t(), torch.randn(6, 40)[:, ::2]):
        assert torch.allclose(op(x), torch.softmax(x, -1), rtol=1e-5)
        assert op(x).is_contiguous()
    for shape in ((0, 5), (3, 0), (2, 0, 4)):
        assert op(torch.empty(shape)).shape == shape
    with pytest.raises(RuntimeError, match="only the last dimension has a kernel"):
        op(torch.randn(2, 3), 0)
    with pytest.raises(RuntimeError, match="must be float32"):
        op(torch.randn(2, 3).double())


def test_it_is_a_good_citizen() -> None:
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    for log in (False, True):
        torch.library.opcheck(torch.ops.fxquant.softmax, (torch.randn(2, 3, 16), -1, log), test_utils=checks)
    out = torch.empty(2, 3)
    torch.library.opcheck(torch.ops.fxquant.softmax_into, (torch.randn(2, 3), False, -1, out), test_utils=checks[:2])


@pytest.mark.parametrize("log", [False, True])
def test_its_gradient_is_torchs(log: bool) -> None:
    x, grad = torch.randn(4, 33, requires_grad=True), torch.randn(4, 33)
    (ours,) = torch.autograd.grad(torch.ops.fxquant.softmax(x, -1, log), x, grad)
    (wanted,) = torch.autograd.grad((torch.log_softmax if log else torch.softmax)(x, -1), x, grad)
    assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((1024, 128), "softmax"),
        ((1, 1 << 17), "softmax"),
        ((4096, 64), None),  # short rows
        ((64, 1024), None),  # a small tensor: the call costs more than it saves
        ((2, 1 << 19), None),  # longer than what was measured
    ],
)
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_compiled_softmax_runs_in_our_kernel_where_it_measured_faster(
    shape: tuple[int, int], kernel: str | None, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXQUANT_ISA", isa)
    (site,) = fxquant.explain(lambda x: torch.softmax(x, -1), torch.randn(shape)).sites
    assert site.kernel == (kernel if isa == "avx2" else None)
    assert site.kernel is not None or f"{shape[0] * shape[1]} elements in rows of {shape[1]}" in str(site.reason)
