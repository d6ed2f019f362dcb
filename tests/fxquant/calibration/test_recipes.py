"""Every recipe changes what it says at a real site, survives a file, and runs on the kernels that its scheme has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CalibrationError, reference
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.observers import Histogram, Samples
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.recipes import RECIPES
from fxquant.calibration.recipes.vit import VIT_RECIPES
from fxquant.calibration.searches import kl, omse
from fxquant.formats import Uniform

TENSOR_RANGES = ("ema", "kl", "omse", "percentile")  # of activations alone


def model_and_batches() -> tuple[nn.Sequential, list[Tensor]]:
    """Channels of unlike range, two of them outliers, and correlated: what the methods were made for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 40))
    mix = torch.randn(48, 48) / 7 + torch.diag(torch.linspace(0.2, 2, 48))
    mix[:, 7] *= 12
    return model, [torch.randn(64, 48) @ mix for _ in range(4)]


def compiled(model: Any, calibration: Calibration, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    options: Any = {"codegen": "ops", "calibration": calibration}
    fast = torch.compile(model, backend="fxquant", options=options)
    with torch.no_grad():
        out: Tensor = fast(x)
    return out


def error(model: nn.Module, calibration: Calibration, x: Tensor) -> float:
    with torch.no_grad():
        wanted = model(x)
        return float((compiled(model, calibration, x) - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize(
    "method", [name for name, each in RECIPES.items() if name not in ("minmax", "flexq", "fireq") and each.vectors is None]
)  # two know one scheme, the last two need a norm
@pytest.mark.parametrize("scheme", ["w6a6", "w4a16-g16"])
def test_a_method_changes_a_site_against_min_max(method: str, scheme: str, tmp_path: Path) -> None:
    model, batches = model_and_batches()
    if scheme == "w4a16-g16" and method in (*TENSOR_RANGES, "smoothquant", "fpq", *(recipe.name for recipe in VIT_RECIPES)):
        with pytest.raises(CalibrationError, match="nothing to fix"):
            fxquant.calibrate(model, batches, scheme=scheme, method=method)
        return
    found = fxquant.calibrate(model, batches, scheme=scheme, method=method)
    again = fxquant.calibrate(model, batches, scheme=scheme, method=method)
    assert found == again
    found.save(tmp_path / "file.safetensors")
    assert Calibration.load(tmp_path / "file.safetensors") == found
    if scheme == "w6a6":
        plain = fxquant.calibrate(model, batches, scheme=scheme)
        assert all(found.sites[name] != site for name, site in plain.sites.items())
    rows = list(fxquant.explain(model, batches[0], options={"calibration": found}).sites)
    assert [row.scheme and row.scheme.partition(" ")[0] for row in rows if row.kind == "linear"] == [scheme] * 2
    assert error(model, found, batches[0]) < 0.05


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a8", "w6a6"])
def test_gptq_and_the_search_beat_rounding_to_the_nearest(scheme: str) -> None:
    model, batches = model_and_batches()
    unseen = batches.pop()
    with torch.no_grad():
        wanted = model(unseen)
        fast = torch.compile(model, backend="fxquant", options={"codegen": "ops", "scheme": scheme})
        nearest = float((fast(unseen) - wanted).square().mean() / wanted.square().mean())
    for method in ("gptq", "search"):
        assert error(model, fxquant.calibrate(model, batches, scheme=scheme, method=method), unseen) < nearest


def test_percentile_has_one_range_a_tensor_and_clips_the_tails() -> None:
    model, batches = model_and_batches()
    batches[0][0, 0] = 1e4
    found, plain = (fxquant.calibrate(model, batches * 200, scheme="w8a8", method=name) for name in ("percentile", "minmax"))
    static, wide = (each.sites["0:linear"].static for each in (found, plain))
    assert isinstance(static, StaticQParams)
    assert isinstance(wide, StaticQParams)
    assert torch.equal(static.factor, torch.ones(48))
    assert static.scale < wide.scale


def test_each_range_of_a_tensor_is_its_formula() -> None:
    model, batches = model_and_batches()
    batches[2] *= 3
    given = {}
    for method in ("ema", "omse", "kl"):
        static = fxquant.calibrate(model, batches, scheme="w4a4", method=method).sites["0:linear"].static
        assert isinstance(static, StaticQParams)
        assert torch.equal(static.factor, torch.ones(48))
        given[method] = static.scale * 15
    extents = [float(x.max() - x.min()) for x in batches]
    average = extents[0]
    for extent in extents[1:]:
        average += 0.01 * (extent - average)
    assert given["ema"] == pytest.approx(average, rel=1e-5)
    whole = float(torch.cat(batches).max() - torch.cat(batches).min())
    samples, form = Samples.of("0:linear", torch.cat(batches)), Uniform(4)
    assert given["omse"] == pytest.approx(15 * float(omse(samples, form).qparams["scale"]))  # all 256 rows are kept
    assert given["omse"] < 0.9 * whole
    histogram = Histogram("0:linear")
    for x in batches:
        histogram.observe(x)
    assert given["kl"] == pytest.approx(15 * float(kl(histogram, form).qparams["scale"]))
    assert given["kl"] < 0.9 * whole


def test_smoothquant_divides_by_the_published_factor() -> None:
    model, batches = model_and_batches()
    site = fxquant.calibrate(model, batches, scheme="w8a8", method="smoothquant").sites["0:linear"]
    seen = torch.cat(batches).abs().amax(0)
    wanted = (seen / model.get_parameter("0.weight").detach().abs().amax(0)).sqrt()
    assert site.migration is not None
    assert site.migration.factor is not None
    torch.testing.assert_close(site.migration.factor, wanted)


def test_codes_of_a_static_site_are_of_the_weight_times_the_steps() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(48, 40), torch.rand(200, 48) - 0.5
    site = fxquant.calibrate(model, [x], scheme="w8a8", method="gptq").sites[":linear"]
    assert site.codes is not None
    assert isinstance(site.static, StaticQParams)
    torch.testing.assert_close(site.codes.value / site.static.steps, model.weight.detach(), atol=2e-3, rtol=0)
    steps, zero_point = site.static.inputs.values()
    wanted = reference.linear_static(x, site.codes.codes, site.codes.scale, model.bias, steps, zero_point, 8)
    assert torch.equal(compiled(model, Calibration("gptq", 1, {":linear": site}), x), wanted)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(CalibrationError, match="did you mean 'smoothquant'"):
        fxquant.calibrate(nn.Linear(4, 4), [torch.randn(2, 4)], scheme="w8a8", method="smothquant")
