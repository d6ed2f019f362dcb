"""Recipes that go on behind the quantized prefix: what each changes at real sites, files, stop and resume, progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.qparams import StaticQParams
from fxquant.calibration.run import run
from fxquant.calibration.site import SiteCalibration, WeightCodes

METHODS = ("gptaq", "repquant", "i&s")
WIDTH = 24
BLOCKS = 2


class Block(nn.Module):
    """Pre-norm, with channels of unlike range behind the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        with torch.no_grad():
            self.norm.weight.mul_(torch.logspace(-1, 1, WIDTH)).div_(2)
            self.norm.bias.add_(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        return out


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(BLOCKS)]).eval()


def batches() -> list[Tensor]:
    return [torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def calibrated(method: str, scheme: str = "w4a4") -> Calibration:
    return fxquant.calibrate(model(), batches(), scheme=scheme, method=method)


def weights(site: SiteCalibration) -> WeightCodes:
    assert site.codes is not None
    return site.codes


def static(site: SiteCalibration) -> StaticQParams:
    assert isinstance(site.static, StaticQParams)
    return site.static


@pytest.mark.parametrize("method", METHODS)
def test_it_codes_real_sites_in_another_way_than_min_max_and_comes_back_from_its_file(method: str, tmp_path: Path) -> None:
    plain, found = calibrated("minmax"), calibrated(method)
    assert found.sites.keys() == plain.sites.keys()
    assert all(site.codes is not None and site.digest != plain.sites[name].digest for name, site in found.sites.items())
    found.save(tmp_path / "kept.safetensors")
    loaded = Calibration.load(tmp_path / "kept.safetensors")
    assert loaded == found
    x, net = torch.randn(100, WIDTH), model()
    options: list[Any] = [{"scheme": "w4a4", "calibration": each, "codegen": "ops"} for each in (found, loaded)]
    outputs = []
    for each in options:
        torch._dynamo.reset()
        with torch.no_grad():
            outputs.append(torch.compile(net, backend="fxquant", options=each)(x))
    assert torch.equal(*outputs)


def test_gptaq_is_gptq_at_the_first_linear_and_differs_behind_it() -> None:
    alone, behind = (calibrated(method, "w4a16-g8") for method in ("gptq", "gptaq"))
    first, second = (f"0.{name}:linear" for name in ("wide", "narrow"))
    assert torch.equal(weights(behind.sites[first]).codes, weights(alone.sites[first]).codes)
    assert not torch.equal(weights(behind.sites[second]).codes, weights(alone.sites[second]).codes)


def test_repquant_clips_what_follows_a_norm_and_nothing_else() -> None:
    repq, found = calibrated("repq"), calibrated("repquant")
    for i in range(BLOCKS):
        clipped, other = (static(found.sites[f"{i}.{name}:linear"]) for name in ("wide", "narrow"))
        before, same = (static(repq.sites[f"{i}.{name}:linear"]) for name in ("wide", "narrow"))
        assert bool((clipped.steps <= before.steps * 1.001).all())
        assert bool((clipped.steps < before.steps * 0.999).any())
        assert other.digest == same.digest


def test_ias_has_repqs_activations_and_tuned_weights() -> None:
    repq, found = calibrated("repq"), calibrated("i&s")
    for name, site in found.sites.items():
        assert static(site).digest == static(repq.sites[name]).digest
        assert not torch.equal(weights(site).codes, weights(repq.sites[name]).codes)


@pytest.mark.parametrize("method", METHODS)
def test_one_that_is_stopped_goes_on_and_tells_its_progress(method: str, tmp_path: Path) -> None:
    config: Any = {"scheme": "w4a4", "method": method, "budget": None, "options": None, "seed": 0}
    file = tmp_path / "kept.safetensors"
    heard: list[tuple[str, int, int | None]] = []

    def stop(what: str, done: int, total: int | None) -> None:
        if done == 3 if what == "rounding sites" else " 1." in what:  # in the second block
            raise KeyboardInterrupt

    def listen(to: list[tuple[str, int, int | None]]) -> Callable[[str, int, int | None], None]:
        return lambda what, done, total: to.append((what, done, total))

    with pytest.raises(KeyboardInterrupt):
        run(model(), batches(), checkpoint=file, progress=stop, **config)
    assert file.exists()
    found = run(model(), batches(), checkpoint=file, progress=listen(heard), **config)
    assert not file.exists()
    whole: list[tuple[str, int, int | None]] = []
    assert found == run(model(), batches(), checkpoint=None, progress=listen(whole), **config)
    assert [done for what, done, _ in heard if what == "rounding sites"][-1] == 2 * BLOCKS
    assert len(heard) < len(whole)
    for step in {what for what, _, _ in whole}:
        counts = [(done, total) for what, done, total in whole if what == step]
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1]
