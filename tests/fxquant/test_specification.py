"""Schemes without a kernel run as their specification; what a calibration moves and rounds is what is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

import fxquant
from fxquant import reference
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.recipes.gelu import choose_after_gelu
from fxquant.calibration.site import Migration, SiteCalibration, StaticCoding, WeightCodes, weight_digest
from fxquant.coding import Coding
from fxquant.errors import CalibrationError
from fxquant.format_schemes import FORMAT_SCHEMES
from fxquant.formats import Uniform
from fxquant.granularity import PerChannel, PerTensor
from fxquant.planning import ANOTHER_WEIGHT, NO_KERNEL, NO_KERNEL_OF_CODING

K, N = 40, 24


def layer(seed: int = 0) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(K, N), torch.randn(6, K) * torch.linspace(0.1, 3, K)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="fxquant", options={"codegen": "ops", **options})


def one_site(scheme: str, **parts: Any) -> Calibration:
    return Calibration("by hand", 1, {":linear": SiteCalibration(scheme, (N, K), **parts)})


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_a_scheme_without_a_kernel_computes_its_specification(codegen: str) -> None:
    model, x = layer()
    fast = compiled(model, scheme="w3a3", codegen=codegen)
    wanted = linear(reference.fake_quant_per_token(x, 3), reference.fake_quant_per_channel(model.weight, 3), model.bias)
    torch.testing.assert_close(fast(x), wanted, atol=1e-5, rtol=1e-5)
    (row,) = fxquant.report(fast).sites
    assert (row.scheme, row.kernel, row.error_class, row.reason) == ("w3a3", None, "QUANTIZED", NO_KERNEL)
    assert row.bytes_after == N * K * 4


@torch.no_grad()
def test_odd_groups_have_no_kernel_and_still_mean_what_they_say() -> None:
    model, x = layer()
    fast = compiled(model, scheme="w4a16-g12")
    wanted = linear(x, reference.fake_quant_per_group(model.weight, 4, 12), model.bias)
    torch.testing.assert_close(fast(x), wanted)


@torch.no_grad()
def test_a_static_scheme_without_a_kernel_uses_its_qparams() -> None:
    model, x = layer()
    calibration = fxquant.calibrate(model, [x], scheme="w3a4")
    site = calibration.sites[":linear"]
    assert isinstance(site.static, StaticQParams)
    fast = compiled(model, calibration=calibration)  # its scheme comes with it
    if site.is_accurate:
        steps, zero_point = site.static.inputs.values()
        weight = reference.fake_quant_per_channel(model.weight * steps, 3) / steps
        wanted = linear(reference.fake_quant_static(x, steps, zero_point, 4), weight, model.bias)
        torch.testing.assert_close(fast(x), wanted, atol=1e-5, rtol=1e-5)
    fast(x)
    assert str(fxquant.report(fast).sites[0].scheme).startswith("w3a4")


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w3a3"])
def test_a_migration_moves_a_factor_and_a_shift_into_the_weight(scheme: str) -> None:
    model, x = layer()
    factor, shift = torch.linspace(0.5, 4, K), torch.linspace(-1, 1, K)
    fast = compiled(model, calibration=one_site(scheme, migration=Migration(factor, shift)), scheme=scheme)
    moved, weight, bias = (x - shift) / factor, model.weight * factor, model.bias + model.weight @ shift
    bits = int(scheme[1])
    moved = moved if scheme == "w4a16" else reference.fake_quant_per_token(moved, bits)
    wanted = linear(moved, reference.fake_quant_per_channel(weight, bits), bias)
    torch.testing.assert_close(fast(x), wanted, atol=1e-4, rtol=1e-4)
    assert fxquant.report(fast).sites[0].scheme == scheme


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_codes_of_a_calibration_are_those_that_the_kernel_multiplies(codegen: str) -> None:
    model, x = layer()
    codes, scale = reference.quantize_weight(model.weight, 8)
    other = torch.where(codes > 0, codes - 1, codes)  # no rounding of ours gives these
    known = WeightCodes(other, scale, weight_digest(model.weight))
    fast = compiled(model, calibration=one_site("w8a8", codes=known), scheme="w8a8", codegen=codegen)
    assert torch.equal(fast(x), reference.linear_dynamic(x, other, scale, model.bias, 8))


@torch.no_grad()
def test_a_weight_that_was_not_rounded_by_the_calibration_stays_float() -> None:
    model, x = layer()
    codes, scale = reference.quantize_weight(model.weight, 8)
    known = WeightCodes(codes, scale, weight_digest(model.weight))
    fast = compiled(model, calibration=one_site("w8a8", codes=known), scheme="w8a8")
    fast(x)
    model.weight[0, 0] += 1
    torch.testing.assert_close(fast(x), model(x))
    assert fxquant.report(fast).sites[0].reason == ANOTHER_WEIGHT


@torch.no_grad()
def test_grouped_codes_reach_the_streaming_kernel() -> None:
    model, x = layer()
    codes, scale = reference.quantize_weight_groups(model.weight, 4, 16)
    known = WeightCodes(-codes, scale, weight_digest(model.weight), 16)
    fast = compiled(model, calibration=one_site("w4a16-g16", codes=known), scheme="w4a16-g16")
    torch.testing.assert_close(fast(x) - model.bias, linear(x, known.value), atol=1e-4, rtol=1e-4)


def test_every_part_of_a_site_survives_a_file(tmp_path: Path) -> None:
    model, x = layer()
    codes, scale = reference.quantize_weight_groups(model.weight, 4, 16)
    coding = Coding(Uniform(5, is_symmetric=True), PerChannel(1))
    parts = {
        "static": StaticCoding(coding, coding.fit(x)),
        "migration": Migration(torch.ones(K), torch.zeros(K)),
        "codes": WeightCodes(codes, scale, "a digest", 16),
        "note": "a sentence",
        "is_explicit": True,
    }
    calibration = one_site("w4a16-g16", **parts)
    calibration.save(tmp_path / "file.safetensors")
    assert Calibration.load(tmp_path / "file.safetensors") == calibration


def test_a_file_with_a_tensor_of_the_wrong_shape_is_damaged(tmp_path: Path) -> None:
    calibration = one_site("w8a8", migration=Migration(torch.ones(K + 1)))
    calibration.save(tmp_path / "file.safetensors")
    with pytest.raises(CalibrationError, match=r"is damaged.*\(40,\)"):
        Calibration.load(tmp_path / "file.safetensors")


def test_a_coding_quantizes_in_the_shape_of_its_tensor() -> None:
    x = torch.randn(2, 3, 5)
    for granularity in (PerTensor(), PerChannel(1), PerChannel(-1)):
        coding = Coding(Uniform(8), granularity)
        out = coding.fake_quant(x)
        assert out.shape == x.shape
        torch.testing.assert_close(out, x, atol=0.05, rtol=0)
        assert Coding.from_json(coding.to_json()) == coding


@torch.no_grad()
@pytest.mark.parametrize("name", list(FORMAT_SCHEMES))
def test_every_scheme_by_a_number_format_computes_its_specification(name: str) -> None:
    model, x = layer()
    fast = compiled(model, scheme=name)
    scheme = FORMAT_SCHEMES[name]
    coded = x if scheme.activation is None else scheme.activation.fake_quant(x)
    torch.testing.assert_close(fast(x), linear(coded, scheme.weight.fake_quant(model.weight), model.bias), atol=1e-5, rtol=1e-5)
    (row,) = fxquant.report(fast).sites
    assert (row.scheme, row.error_class) == (name, "QUANTIZED")
    assert (row.kernel, row.reason) == (("linear_stream", None) if scheme.table_group else (None, NO_KERNEL))
    assert Coding.from_json(scheme.weight.to_json()) == scheme.weight


@torch.no_grad()
@pytest.mark.parametrize("name", ["nf4", "mxfp4", "fp8"])
def test_number_formats_through_inductor(name: str) -> None:
    model, x = layer()
    ops, inductor = compiled(model, scheme=name)(x), compiled(model, scheme=name, codegen="inductor")(x)
    torch.testing.assert_close(ops, inductor, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_a_calibration_may_give_the_input_a_format_of_its_own(codegen: str) -> None:
    model, x = layer()
    coding = Coding(Uniform(5, is_symmetric=True), PerTensor())
    known = StaticCoding(coding, coding.fit(x))
    fast = compiled(model, calibration=one_site("fp8", static=known), scheme="fp8", codegen=codegen)
    wanted = linear(coding.fake_quant(x), FORMAT_SCHEMES["fp8"].weight.fake_quant(model.weight), model.bias)
    torch.testing.assert_close(fast(x), wanted, atol=1e-5, rtol=1e-5)
    assert fxquant.report(fast).sites[0].scheme == "fp8 static"


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
@pytest.mark.parametrize("scheme", ["w4a4", "w8a8", "w4a8-g16", "w3a3"])
def test_integer_weights_and_an_input_in_a_number_format_have_no_kernel(scheme: str, codegen: str) -> None:
    model, x = layer()
    coding = Coding(Uniform(5, is_symmetric=True), PerTensor())
    calibration = one_site(scheme, static=StaticCoding(coding, coding.fit(x)))
    fast = compiled(model, calibration=calibration, scheme=scheme, codegen=codegen)
    bits, group = int(scheme[1]), scheme.endswith("-g16")
    rounded = (
        reference.fake_quant_per_group(model.weight, bits, 16)
        if group
        else reference.fake_quant_per_channel(model.weight, bits)
    )
    torch.testing.assert_close(fast(x), linear(coding.fake_quant(x), rounded, model.bias), atol=1e-5, rtol=1e-5)
    (row,) = fxquant.report(fast).sites
    assert (row.scheme, row.kernel, row.reason) == (f"{scheme} static symmetric5", None, NO_KERNEL_OF_CODING)


@torch.no_grad()
def test_a_float_input_stays_float() -> None:
    model, x = layer()
    coding = Coding(Uniform(5), PerTensor())
    fast = compiled(model, calibration=one_site("w4a16", static=StaticCoding(coding, coding.fit(x))), scheme="w4a16")
    assert torch.equal(fast(x), compiled(layer()[0], scheme="w4a16")(x))
    (row,) = fxquant.report(fast).sites
    assert (row.scheme, row.kernel) == ("w4a16", "linear_stream")
    assert row.reason == "the calibration has a number format for the input, and w4a16 leaves it float"


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(gelu(self.fc1(x)))
        return y


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
@pytest.mark.parametrize("method", ["ptq4vit", "adalog"])
def test_a_linear_behind_gelu_in_the_format_of_a_published_method(method: str, codegen: str) -> None:
    """With the weight that a calibration rounded; the other linear of the layer keeps its kernel."""
    torch.manual_seed(0)
    model, x = FeedForward(), 2 * torch.randn(50, 24)
    hidden = gelu(model.fc1(x))
    static = choose_after_gelu("fc2", hidden, model.fc2.weight, method, 4)
    codes, scale = reference.quantize_weight(model.fc2.weight, 4)
    other = torch.where(codes > 0, codes - 1, codes)
    known = WeightCodes(other, scale, weight_digest(model.fc2.weight))
    site = SiteCalibration("w4a4", (24, 96), static, codes=known)
    calibration = Calibration("by hand", 1, {"fc2:linear": site})
    fast = compiled(model, calibration=calibration, sites={"fc2": "w4a4", "fc1": "w8a8"}, codegen=codegen)
    first = reference.linear_dynamic(x, *reference.quantize_weight(model.fc1.weight, 8), model.fc1.bias, 8)
    wanted = linear(static.coding.fake_quant(gelu(first), static.qparams), known.value, model.fc2.bias)
    far = ~torch.isclose(fast(x), wanted, atol=1e-4, rtol=1e-4)  # GELU rounds differently: a code may be the next one
    assert float(far.double().mean()) < 0.05
    rows = {row.name: (row.scheme, row.kernel, row.reason) for row in fxquant.report(fast).sites if row.kind == "linear"}
    assert rows["fc2:linear"] == (f"w4a4 static {static.coding.format.name}", None, NO_KERNEL_OF_CODING)
    assert rows["fc1:linear"][:2] == ("w8a8", "linear_dynamic")
