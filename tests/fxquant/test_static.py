"""Static activations from a calibration, end to end: the same codes as the specification, in every way of generating code."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import run_and_get_code

import fxquant
from fxquant import reference
from fxquant.binding import Slot
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.site import SiteCalibration
from fxquant.config import FxQuantConfig, resolve_options
from fxquant.errors import CalibrationError, ConfigError
from fxquant.schemes import SCHEMES
from fxquant.tracker import tracker

SCHEME = "w8a7"


def data(rows: int = 40, width: int = 48) -> Tensor:
    """Rows whose channels differ in range and centre."""
    return torch.randn(rows, width) * torch.logspace(-1, 1, width) + torch.linspace(-1, 2, width)


def calibrated(model: nn.Module, x: Tensor, scheme: str = SCHEME) -> Calibration:
    """A calibration in which every site counts as accurate, so that all of them become static."""
    found = fxquant.calibrate(model, [x], scheme=scheme)
    return Calibration(found.method, found.batches, {name: accurate(site) for name, site in found.sites.items()})


def accurate(site: SiteCalibration, **changes: Any) -> SiteCalibration:
    q = site.static
    assert isinstance(q, StaticQParams)
    values = {"scale": q.scale, "zero_point": q.zero_point, "exponent": q.exponent, "noise": 1.0, "dynamic_noise": 1.0}
    return SiteCalibration(site.scheme, site.shape, StaticQParams(q.factor, **{**values, **changes}))


def compiled(model: Any, calibration: Any, **options: Any) -> Any:
    given: Any = {"scheme": SCHEME, "codegen": "ops", "calibration": calibration, **options}
    return torch.compile(model, backend="fxquant", options=given)


def expected(linear: nn.Linear, x: Tensor, site: SiteCalibration) -> Tensor:
    """The specification: codes of x by the steps, those of the weight times the steps, exact sums."""
    assert site.static is not None
    scheme, (steps, zero_point) = SCHEMES[site.scheme], site.static.inputs.values()
    codes, scale = reference.quantize_weight(linear.weight.to(torch.float32) * steps, scheme.weight_bits)
    bias = None if linear.bias is None else linear.bias.to(torch.float32)
    return reference.linear_static(x.to(torch.float32), codes, scale, bias, steps, zero_point, scheme.act_bits)


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a7", "w6a6", "w4a8"])
def test_a_static_linear_equals_its_specification_bit_for_bit(scheme: str, codegen: str) -> None:
    linear, x = nn.Linear(48, 37), data()
    calibration = calibrated(linear, x, scheme)
    fast = compiled(linear, calibration, scheme=scheme, codegen=codegen)
    wild = data(7) * 5  # beyond the range: clipped
    wild[2, 3] = float("nan")
    for rows in (x, wild.view(1, 7, 48)):
        wanted = expected(linear, rows, calibration.sites[":linear"])
        got = fast(rows)
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
        assert torch.equal(got.isnan(), wanted.isnan())
    (row,) = fxquant.report(fast).sites
    assert (row.scheme, row.kernel, row.error_class) == (f"{scheme} static", "linear_static", "QUANTIZED")
    assert row.static_noise_db == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_cast_back(dtype: torch.dtype) -> None:
    linear, x = nn.Linear(48, 32).to(dtype), data().to(dtype)
    calibration = calibrated(linear, x)
    y = compiled(linear, calibration)(x)
    assert torch.equal(y, expected(linear, x, calibration.sites[":linear"]).to(dtype))


@torch.no_grad()
def test_the_specification_graph_agrees_with_the_kernels(tmp_path: Path) -> None:
    first, second = nn.Linear(48, 64), nn.Linear(64, 8)
    model, x = nn.Sequential(first, nn.ReLU(), second), data()
    calibration = calibrated(model, x)
    y = compiled(model, calibration, dump=str(tmp_path))(x)
    (text,) = [path.read_text() for path in sorted(tmp_path.rglob("*quantize*.py"))]
    assert text.count("fake_quant_static.default(") == 2
    hidden = x
    for name, linear in (("0", first), ("2", second)):
        static = calibration.sites[f"{name}:linear"].static
        assert static is not None
        steps, zero_point = static.inputs.values()
        q = torch.ops.fxquant.fake_quant_static(hidden, steps, zero_point, 7)
        weight = torch.ops.fxquant.fake_quant_per_channel(linear.weight * steps, 8) / steps
        hidden = nn.functional.linear(q, weight, linear.bias)
        hidden = hidden.relu() if name == "0" else hidden
    assert (y - hidden).norm() < 0.01 * hidden.norm()


@torch.no_grad()
def test_inductor_fuses_gelu_and_residual_into_the_static_kernel() -> None:
    linear, x = nn.Linear(48, 48), data()
    calibration = calibrated(linear, x)
    sites = {"linear:linear": calibration.sites[":linear"], ":linear": calibration.sites[":linear"]}
    calibration = Calibration("minmax", 1, sites)

    def function(x: Tensor) -> Tensor:
        return x + nn.functional.gelu(linear(x))

    fast = compiled(function, calibration, codegen="inductor", inductor={"fx_graph_cache": False})
    got, codes = run_and_get_code(fast, x)
    torch._dynamo.reset()
    assert torch.allclose(got, compiled(function, calibration)(x), rtol=1e-5, atol=1e-5)
    code = "\n".join(codes)
    (kernel,) = [part for part in code.split("async_compile.cpp") if "#pragma omp for" in part]
    assert "erf" in kernel
    assert "fxquant_quantize_rows_static(X, K" in kernel or "fxquant_quantize_rows_static(" in kernel.split("parallel")[1]
    assert code.count("async_compile.cpp_pybinding(") == 1


@torch.no_grad()
def test_the_state_of_a_calibration_survives_its_file(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48)), data()
    calibration = calibrated(model, x)
    path = tmp_path / "c.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert loaded == calibration
    assert hash(loaded) == hash(calibration)
    before = len(tracker().graphs())
    y = compiled(model, calibration)(x)
    assert torch.equal(compiled(model, loaded)(x), y)  # equal options: Dynamo compiles nothing again
    assert len(tracker().graphs()) == before + 1
    torch._dynamo.reset()
    assert torch.equal(compiled(model, str(path))(x), y)


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_a_changed_weight_is_packed_again_with_the_same_steps(codegen: str) -> None:
    linear, x = nn.Linear(48, 32), data()
    calibration = calibrated(linear, x)
    fast = compiled(linear, calibration, codegen=codegen)
    for change in (lambda: None, lambda: linear.load_state_dict(nn.Linear(48, 32).state_dict()), lambda: linear.weight.mul_(2)):
        change()
        assert torch.equal(fast(x), expected(linear, x, calibration.sites[":linear"]))


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_layers_compiled_one_by_one_share_a_graph(codegen: str) -> None:
    layers, x = [nn.Linear(48, 48) for _ in range(3)], data()
    calibration = calibrated(layers[0], x)
    gc.collect()  # graphs of other tests
    before = len(tracker().graphs())
    runs = [compiled(layer, calibration, codegen=codegen) for layer in layers]
    for _ in range(2):
        for layer, run in zip(layers, runs, strict=True):
            assert torch.equal(run(x), expected(layer, x, calibration.sites[":linear"]))
    assert len(tracker().graphs()) == before + 1
    assert [row.scheme for row in fxquant.report(nn.ModuleList(layers)).sites] == [f"{SCHEME} static"] * 3


@torch.no_grad()
def test_layers_with_calibrations_of_their_own_do_not_meet() -> None:
    layers, inputs = [nn.Linear(48, 48) for _ in range(3)], [data() * scale for scale in (1, 10, 0.1)]
    calibrations = [calibrated(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    runs = [compiled(layer, calibration) for layer, calibration in zip(layers, calibrations, strict=True)]
    runs.append(compiled(layers[0], None))
    for _ in range(2):
        for layer, run, x, calibration in zip(layers, runs, inputs, calibrations, strict=False):
            assert torch.equal(run(x), expected(layer, x, calibration.sites[":linear"]))
        codes, scale = reference.quantize_weight(layers[0].weight, 8)
        assert torch.equal(runs[3](inputs[0]), reference.linear_dynamic(inputs[0], codes, scale, layers[0].bias, 7))


@torch.no_grad()
def test_one_weight_at_two_sites_has_the_steps_of_each() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(48, 48), nn.Linear(48, 48)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(y)

    model, x, y = Twice(), data(), data() * 10
    found = fxquant.calibrate(model, [(x, y)], scheme=SCHEME)
    calibration = Calibration("minmax", 1, {name: accurate(site) for name, site in found.sites.items()})
    assert len(calibration.sites) == 2
    (first, second), wanted = compiled(model, calibration)(x, y), list(calibration.sites.values())
    assert torch.equal(first, expected(model.a, x, wanted[0]))
    assert torch.equal(second, expected(model.b, y, wanted[1]))


@torch.no_grad()
def test_a_weight_that_cannot_be_packed_any_more_stays_float() -> None:
    first, second = nn.Linear(48, 48), nn.Linear(48, 48)
    model, x = nn.Sequential(first, second), data()
    fast = compiled(model, calibrated(model, x))
    fast(x)
    first.weight[0, 0] = float("inf")
    assert torch.equal(fast(x)[:, 1:].isnan(), torch.ones(40, 47, dtype=torch.bool))  # an infinite channel: rows are NaN
    assert [row.scheme for row in fxquant.report(fast).sites] == [None, f"{SCHEME} static"]


def one_site(site: SiteCalibration, **changes: Any) -> SiteCalibration:
    values = {"static": site.static, "scheme": site.scheme, "shape": site.shape, **changes}
    return SiteCalibration(**values)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda site: None, "dynamic: the calibration has no site of this name"),
        (lambda site: one_site(site, shape=(9, 48)), "dynamic: the calibration is of a weight of 9×48, this one has 32×48"),
        (lambda site: one_site(site, scheme="w8a8"), "dynamic: the calibration is of w8a8, not of w8a7"),
        (
            lambda site: accurate(site, noise=2.0),
            "dynamic: static codes would cost more than 0.5 dB of noise, as predicted from the calibration's data",
        ),
        (lambda site: accurate(site, scale=1e-30), "dynamic: the input was zero in all of the calibration's data"),
    ],
)
def test_one_site_that_does_not_fit_stays_dynamic_and_says_why(change: Any, sentence: str) -> None:
    model, x = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 32)), data()
    calibration = calibrated(model, x)
    changed = change(calibration.sites["1:linear"])
    sites = {"0:linear": calibration.sites["0:linear"]} | ({} if changed is None else {"1:linear": changed})
    report = fxquant.explain(model, x, options={"scheme": SCHEME, "calibration": Calibration("minmax", 1, sites)})
    first, second = report.sites
    assert (first.scheme, first.reason) == (f"{SCHEME} static", None)
    assert (second.scheme, second.reason) == (SCHEME, sentence)
    assert report.unaccounted == ()
    assert "w8a7 static" in str(report)
    assert sentence in report.to_json()


@torch.no_grad()
def test_a_scheme_without_static_kernels_says_so() -> None:
    linear, x = nn.Linear(64, 48), data(width=64)
    calibration = calibrated(linear, x)
    for scheme, reason in (
        ("w4a8-g32", "dynamic: w4a8-g32 has no kernel with static activations"),
        ("w4a16", "to the nearest: the calibration is of w8a7, not of w4a16"),
    ):
        (row,) = fxquant.explain(linear, x, options={"scheme": scheme, "calibration": calibration}).sites
        assert (row.scheme, row.reason) == (scheme, reason)


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x)
        return y


@torch.no_grad()
@pytest.mark.parametrize("call", ["explain", "compile"])
def test_a_calibration_of_another_model_is_refused(call: str) -> None:
    other = calibrated(nn.Sequential(nn.Linear(48, 8)), data())
    model, x = Up(), data()
    options: Any = {"scheme": SCHEME, "calibration": other}
    run = {"explain": lambda: fxquant.explain(model, x, options=options), "compile": lambda: compiled(model, other)(x)}[call]
    message = r"a calibration of another model: it knows '0:linear', and this graph has 'up:linear'"
    with pytest.raises((CalibrationError, BackendCompilerFailed), match=message):
        run()


@torch.no_grad()
def test_an_unreadable_file_and_a_wrong_value_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.safetensors")
    with pytest.raises(
        (CalibrationError, BackendCompilerFailed), match=r"calibration file .*missing\.safetensors cannot be read"
    ):
        compiled(nn.Linear(48, 8), missing)(data())
    with pytest.raises(ConfigError, match=r"option 'calibration': .*got 3"):
        FxQuantConfig(calibration=3)


def test_options_are_compared_by_the_digest() -> None:
    linear, x = nn.Linear(48, 8), data()
    first, same, other = (calibrated(linear, rows) for rows in (x, x, x * 2))
    assert first == same
    assert first != other
    configs = [resolve_options({"calibration": calibration}) for calibration in (first, same, other, None)]
    assert configs[0] == configs[1]
    assert configs[0] != configs[2] != configs[3]
    assert "calibration by minmax on 1 batches" in str(configs[0].model_dump()["calibration"])


def test_two_calibrations_of_one_weight_are_two_slots() -> None:
    linear, x = nn.Linear(48, 8), data()
    statics = [calibrated(linear, rows).sites[":linear"].static for rows in (x, x, x * 2)]
    slots = [Slot(":linear", WEIGHT, SCHEMES[SCHEME], pack=print, static=static) for static in statics]  # type: ignore[arg-type]
    assert len(set(slots)) == 2
    assert copy.copy(statics[0]) == statics[0]


WEIGHT: Any = None


@torch.no_grad()
def test_dynamic_batches_keep_one_graph() -> None:
    linear, x = nn.Linear(48, 32), data()
    calibration = calibrated(linear, x)
    options: Any = {"scheme": SCHEME, "calibration": calibration}
    fast = torch.compile(linear, backend="fxquant", dynamic=True, options=options)
    before = len(tracker().graphs())
    for rows in (2, 5, 40):
        assert torch.equal(fast(x[:rows]), expected(linear, x[:rows], calibration.sites[":linear"]))
    assert len(tracker().graphs()) == before + 1
