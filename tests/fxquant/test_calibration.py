"""fxquant.calibrate: what it sees, what it chooses, what it refuses, and that its file comes back whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.observers import InputExtents
from fxquant.calibration.qparams import InputStatistics, StaticQParams, choose_qparams
from fxquant.errors import CalibrationError


def statistics(x: Tensor) -> InputStatistics:
    observer = InputExtents("here")
    observer.observe(x)
    seen = observer.statistics()
    assert seen is not None
    return seen


def coded(x: Tensor, q: StaticQParams, bits: int) -> Tensor:
    step = q.scale * q.factor
    return ((torch.round(x / step) + q.zero_point).clamp(0, 2**bits - 1) - q.zero_point) * step


def test_batches_add_up_to_one_pass_over_all_rows() -> None:
    x = torch.randn(60, 5) * 3 + 1
    observer = InputExtents("here")
    for part in (x[:10].view(2, 5, 5), x[10:10], x[10:59], x[59]):
        observer.observe(part)
    got, wanted = observer.statistics(), statistics(x)
    assert got is not None
    assert torch.equal(got.low, wanted.low)
    assert torch.equal(got.high, wanted.high)
    torch.testing.assert_close(got.square, wanted.square)
    assert got.token_range_square == pytest.approx(wanted.token_range_square)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_values_that_were_seen_are_off_by_at_most_one_step(bits: int) -> None:
    x = torch.randn(200, 16) * torch.logspace(-2, 2, 16) + torch.linspace(-3, 3, 16)
    q = choose_qparams(statistics(x), torch.randn(8, 16), 8, bits)
    assert ((coded(x, q, bits) - x).abs() <= q.scale * q.factor * 1.001).all()


def test_channels_of_unlike_ranges_get_factors_and_alike_ones_need_none() -> None:
    weight = torch.randn(32, 64)
    alike = choose_qparams(statistics(torch.rand(500, 64) - 0.5), weight, 8, 8)
    assert alike.factor.amax() / alike.factor.amin() < 1.1
    x = torch.randn(500, 64)
    x[:, 3] *= 100
    unlike = choose_qparams(statistics(x), weight, 8, 8)
    assert unlike.exponent > 0
    plain = (torch.round(x / (2 * x.abs().max() / 255)) * (2 * x.abs().max() / 255) - x) @ weight.T
    assert ((coded(x, unlike, 8) - x) @ weight.T).square().mean() < 0.2 * plain.square().mean()


def test_the_predicted_noise_is_about_the_measured_noise() -> None:
    x, weight = torch.randn(2000, 64) * torch.logspace(-1, 1, 64), torch.randn(32, 64)
    q = choose_qparams(statistics(x), weight, 8, 6)
    folded = weight * q.factor
    step = folded.abs().amax(1, keepdim=True) / 127
    rounded = torch.round(folded / step) * step / q.factor
    measured = float((coded(x, q, 6) @ rounded.T - x @ weight.T).square().sum(1).mean())
    assert q.noise == pytest.approx(measured, rel=0.35)


def test_a_value_that_is_not_finite_names_its_site() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(CalibrationError, match=r"0:linear: the calibration data give an input that is not finite"):
        fxquant.calibrate(model, [torch.full((2, 4), float("nan"))], scheme="w8a8")


@pytest.mark.parametrize(
    ("batches", "changes", "message"),
    [
        ([], {}, "there is no batch"),
        ([torch.zeros(1, 8)], {"method": "magic"}, "unknown method 'magic'; known: minmax"),
        ([torch.zeros(1, 8)], {"scheme": "float"}, "the options leave :linear float"),
        ([torch.zeros(0, 8)], {}, "no linear that could be quantized ran"),
    ],
)
def test_bad_calls_say_what_is_wrong(batches: list[Tensor], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fxquant.calibrate(nn.Linear(8, 8), batches, **{"scheme": "w8a8", **changes})


def test_tensors_tuples_and_mappings_are_batches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 12)

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            out: Tensor = self.up(x if shift is None else x + shift)
            return out

    x = torch.randn(3, 6)
    batches = [x, (x, torch.ones(6)), {"x": x, "shift": torch.full((6,), 2.0)}]
    calibration = fxquant.calibrate(Two(), batches, scheme="w8a7")
    assert calibration.batches == 3
    (site,) = calibration.sites.values()
    assert (site.scheme, site.shape) == ("w8a7", (12, 6))


def test_a_file_comes_back_whole_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    calibration = fxquant.calibrate(nn.Linear(6, 12), [torch.randn(9, 6)], scheme="w8a8")
    path = tmp_path / "c.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert (loaded.method, loaded.batches, list(loaded.sites)) == ("minmax", 1, list(calibration.sites))
    assert loaded == calibration
    assert {name: site.static for name, site in loaded.sites.items()} == {
        name: site.static for name, site in calibration.sites.items()
    }
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(tmp_path / "missing")


def test_the_same_data_give_the_same_qparams_and_the_model_stays_as_it_was() -> None:
    model, x = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)), torch.randn(9, 6)
    before = model(x)
    first, second = (fxquant.calibrate(model, [x, x], scheme="w7a7") for _ in range(2))
    assert first == second
    assert torch.equal(model(x), before)


def test_progress_draws_a_bar_for_every_stage_and_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)), [torch.randn(20, 16) for _ in range(4)]
    shown = fxquant.calibrate(model, batches, scheme="w4a8", method="sequential", progress=True)
    text = capfd.readouterr().out
    assert all(f"{stage} " in text for stage in ("observing batches", "coding sites", "rounding sites"))
    assert "100%" in text
    assert shown == fxquant.calibrate(model, batches, scheme="w4a8", method="sequential")
    assert capfd.readouterr().out == ""
