"""What Inductor generates: the library's tile kernel with the epilogue fused around it, and honest compile caches."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

import fxquant
from fxquant.reference import rows
from fxquant.reference.rows import GELU_END

W8A8: dict[str, Any] = {"scheme": "w8a8"}


@torch.no_grad()
def both(
    model: Callable[..., Tensor], *args: Any, scheme: str = "w8a8", dynamic: bool | None = None
) -> tuple[Tensor, Tensor, str]:
    """The result through Inductor, through the operators, and the generated code."""
    options: Any = {"scheme": scheme, "inductor": {"fx_graph_cache": False}}
    compiled = torch.compile(model, backend="fxquant", options=options, dynamic=dynamic)
    got, codes = run_and_get_code(compiled, *args)
    torch._dynamo.reset()
    plain = torch.compile(model, backend="fxquant", options={"scheme": scheme, "codegen": "ops"})(*args)
    return got, plain, "\n".join(codes)


def test_bias_and_gelu_are_fused_into_the_kernel() -> None:
    linear = nn.Linear(64, 50)
    got, plain, code = both(lambda x: nn.functional.gelu(linear(x)), torch.randn(7, 64))
    assert torch.allclose(got, plain, rtol=1e-6, atol=5e-7)
    assert code.count("fxquant_linear_bias_tile(") == 2  # its declaration and its one call
    (kernel,) = [part for part in code.split("async_compile.cpp") if "#pragma omp for" in part]
    assert str(GELU_END) in kernel
    assert "erf(" not in kernel


@pytest.mark.parametrize(("approximate", "bound"), [("none", 2e-7), ("tanh", 5e-7)])
def test_gelu_is_the_reference_polynomial_and_float_accurate(approximate: str, bound: float) -> None:
    x = torch.cat([torch.linspace(-20, 20, 100_003), torch.tensor([0.0, -0.0, 1e-30, 1e30, float("inf"), float("-inf")])])
    compiled = torch.compile(lambda x: nn.functional.gelu(x, approximate=approximate), backend="fxquant")
    with torch.no_grad():
        y = compiled(x)
        assert compiled(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]
    exact = nn.functional.gelu(x.double(), approximate=approximate)
    finite = x.isfinite()
    assert ((y - exact).abs() / exact.abs().clamp_min(1))[finite].max() <= bound
    assert torch.equal(y[finite], rows.gelu(x, rows.TANH if approximate == "tanh" else rows.ERF)[finite])
    assert y[-2] == float("inf")
    assert abs(y[-1]) <= bound
    site = fxquant.report(compiled).sites[0]
    assert (site.kernel, site.error_class) == ("gelu", "REAL")


def test_a_residual_is_fused_into_the_kernel() -> None:
    linear = nn.Linear(64, 64)
    got, plain, code = both(lambda x, r: linear(x) + r, torch.randn(7, 64), torch.randn(7, 64))
    assert torch.equal(got, plain)
    assert code.count("async_compile.cpp_pybinding(") == 1  # no second kernel for the sum


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_linear_and_bias_are_bit_equal_to_the_operator(n: int) -> None:
    linear = nn.Linear(33, n)
    got, plain, _ = both(lambda x: linear(x), torch.randn(2, 5, 33))
    assert torch.equal(got, plain)


def test_inputs_with_strides_and_results_with_two_readers() -> None:
    linear = nn.Linear(40, 24)

    def function(x: Tensor) -> Tensor:
        y = linear(x.transpose(0, 1))
        return torch.cat([torch.relu(y), y.exp()])

    got, plain, _ = both(function, torch.randn(40, 6))
    assert torch.allclose(got, plain, rtol=1e-5)


def last_rows(linear: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = linear(x[:, 3:])
    return y


def last_rows_and_themselves(linear: nn.Linear, x: Tensor) -> Tensor:
    x = torch.relu(x)
    y: Tensor = linear(x[:, 3:]) + x[:, 3:]
    return y


def part_of_a_bias(linear: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, linear.weight[7:], linear.bias[7:])


@pytest.mark.parametrize("function", [last_rows, last_rows_and_themselves, part_of_a_bias])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8-g64", "w2a4"])
def test_operands_that_begin_inside_their_buffer(function: Callable[..., Tensor], scheme: str) -> None:
    linear = nn.Linear(64, 64)
    got, plain, _ = both(lambda x: function(linear, x), torch.randn(1, 8, 64), scheme=scheme)
    assert torch.equal(got, plain)


def test_an_operand_that_begins_at_a_place_known_at_run_time() -> None:
    linear = nn.Linear(64, 64)
    got, plain, _ = both(lambda x: linear(x[:, x.shape[1] // 2 :]), torch.randn(1, 8, 64), dynamic=True)
    assert torch.equal(got, plain)


@torch.no_grad()
def test_kernels_have_names_of_their_own_in_profiles() -> None:
    """Linears of unlike sizes are told apart; those with equal sources still share one compiled kernel."""
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    options: Any = {**W8A8, "chains": False, "inductor": {"fx_graph_cache": False, "cpp.enable_kernel_profile": True}}
    compiled = torch.compile(model, backend="fxquant", options=options)
    _, (code,) = run_and_get_code(compiled, torch.randn(7, 64))
    assert code.count("async_compile.cpp_pybinding(") == 3
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        compiled(torch.randn(7, 64))
    names = [event.name for event in seen.events() or () if "linear_dynamic" in event.name]
    assert [name.partition("linear_dynamic_")[2] for name in names] == ["w8a8_96x64", "w8a8_64x96", "w8a8_64x64", "w8a8_64x64"]


SCRIPT = """
import torch, sys
from torch._dynamo.utils import counters
torch.manual_seed(0)
linear, x = torch.nn.Linear(64, 48), torch.randn(5, 64)
with torch.no_grad():
    y = torch.compile(lambda x: linear(x).tanh(), backend="fxquant", options={"scheme": sys.argv[1]})(x)
stats = counters["inductor"]
print(stats["fxgraph_cache_hit"], stats["fxgraph_cache_miss"], y.double().sum().item().hex())
"""


def in_new_process(cache: Path, scheme: str, **variables: str) -> tuple[int, int, str]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **variables}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, scheme]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return int(out[0]), int(out[1]), out[2]


def test_a_warm_start_hits_the_cache_and_gives_the_same_bits(tmp_path: Path) -> None:
    cold = in_new_process(tmp_path, "w8a8")
    warm = in_new_process(tmp_path, "w8a8")
    assert (cold[:2], warm[:2]) == ((0, 1), (1, 0))
    assert warm[2] == cold[2]
    assert in_new_process(tmp_path, "w8a7")[:2] == (0, 1)
    assert in_new_process(tmp_path, "w8a8", FXQUANT_ISA="scalar")[:2] == (0, 1)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="needs a CPU for which Inductor can write two widths")
@pytest.mark.parametrize("scheme", ["w8a8", "float"])
def test_code_for_other_vectors_is_no_cache_hit(tmp_path: Path, scheme: str) -> None:
    """Inductor's own key lacks their width: code written in steps of 8 floats and compiled for 16 overruns its buffers."""
    assert in_new_process(tmp_path, scheme, ATEN_CPU_CAPABILITY="avx2")[:2] == (0, 1)
    assert in_new_process(tmp_path, scheme, ATEN_CPU_CAPABILITY="avx512")[:2] == (0, 1)
    assert in_new_process(tmp_path, scheme, ATEN_CPU_CAPABILITY="avx512")[:2] == (1, 0)
