"""A calibration that was stopped goes on, and ends as if it had not been."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CalibrationError
from fxquant.calibration.observers import InputExtents


def model_and_batches() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16)), [torch.randn(40, 24) for _ in range(5)]


@pytest.mark.parametrize("method", ["minmax", "percentile", "search"])
@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stopped_run_goes_on(method: str, stop: int, error: type[BaseException], tmp_path: Path) -> None:
    model, batches = model_and_batches()
    file = tmp_path / "seen.safetensors"

    def interrupted() -> Iterator[Tensor]:
        yield from batches[:stop]
        raise error

    with pytest.raises(error):
        fxquant.calibrate(model, interrupted(), scheme="w6a6", method=method, checkpoint=file)
    assert file.exists()
    asked = []

    def again() -> Iterator[Tensor]:
        for batch in batches:
            asked.append(batch)
            yield batch

    found = fxquant.calibrate(model, again(), scheme="w6a6", method=method, checkpoint=file)
    assert found == fxquant.calibrate(model, batches, scheme="w6a6", method=method)
    assert not file.exists()
    assert len(asked) == len(batches)


def test_a_run_that_had_seen_everything_only_codes_its_sites(tmp_path: Path) -> None:
    model, batches = model_and_batches()
    file = tmp_path / "seen.safetensors"

    def interrupted() -> Iterator[Tensor]:
        yield from batches
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxquant.calibrate(model, interrupted(), scheme="w6a6", checkpoint=file)
    assert fxquant.calibrate(model, batches, scheme="w6a6", checkpoint=file) == fxquant.calibrate(model, batches, scheme="w6a6")


def test_a_file_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model, batches = model_and_batches()
    file = tmp_path / "seen.safetensors"

    def interrupted() -> Iterator[Tensor]:
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxquant.calibrate(model, interrupted(), scheme="w6a6", checkpoint=file)
    with pytest.raises(CalibrationError, match="is of another run"):
        fxquant.calibrate(model, batches, scheme="w8a8", checkpoint=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=r"cannot be read.*delete it"):
        fxquant.calibrate(model, batches, scheme="w6a6", checkpoint=file)


@pytest.mark.parametrize("call", [2, 3])
def test_half_a_batch_counts_as_none(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches()
    file, calls, observe = tmp_path / "seen.safetensors", [0], InputExtents.observe

    def stopped(self: InputExtents, x: Tensor) -> None:
        calls[0] += 1
        if calls[0] == call + 1:
            raise KeyboardInterrupt
        observe(self, x)

    wanted = fxquant.calibrate(model, batches, scheme="w6a6")
    with monkeypatch.context() as patch:
        patch.setattr(InputExtents, "observe", stopped)
        with pytest.raises(KeyboardInterrupt):
            fxquant.calibrate(model, batches, scheme="w6a6", checkpoint=file)
    assert fxquant.calibrate(model, batches, scheme="w6a6", checkpoint=file) == wanted
