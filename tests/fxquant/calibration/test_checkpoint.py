"""A calibration that was stopped goes on, and ends as if it had not been."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CalibrationError
from fxquant.calibration.observers import InputExtents
from fxquant.calibration.recipes import RECIPES
from fxquant.calibration.run import run

WIDTH = 16
SCHEME = {"flexq": "w6a6"}


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


class Attention(nn.Module):
    """A pre-norm block as RMSNorm models have it: attention and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in [(WIDTH, 48)] * 2 + [(48, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (linear(y).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        out: Tensor = x + self.down(nn.functional.gelu(self.gate(y)) * self.up(y))
        return out


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(20, WIDTH), nn.ModuleList([Attention()])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(x))
        return out


class Stop:
    """Hears of progress and raises at one event of it, if one is named."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.heard: list[str] = []

    def __call__(self, what: str, done: int, total: int | None) -> None:
        self.heard.append(what)
        if len(self.heard) - 1 == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_every_method_goes_on_from_wherever_it_is_stopped(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches, file = Decoder().eval(), [torch.randint(20, (2, 12)) for _ in range(4)], tmp_path / "kept.safetensors"
    config: dict[str, Any] = {
        "scheme": SCHEME.get(method, "w4a4"),
        "method": method,
        "budget": None,
        "options": None,
        "seed": 0,
    }
    listener = Stop()
    whole = run(model, batches, checkpoint=None, progress=listener, **config)
    ends = {what: i for i, what in enumerate(listener.heard)}
    assert [*ends][:2] == ["observing batches", "coding sites"]
    for what in {"coding sites", "rounding sites", "tuning scales"} & {*ends}:
        with pytest.raises(KeyboardInterrupt):
            run(model, batches, checkpoint=file, progress=Stop(ends[what]), **config)
        again = Stop()
        assert run(model, batches, checkpoint=file, progress=again, **config) == whole
        assert not file.exists()
        assert what == "coding sites" or not any(each.startswith("learning") for each in again.heard)


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
