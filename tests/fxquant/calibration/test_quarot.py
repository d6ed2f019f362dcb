"""``quarot``, ``search-rotated`` and ``reconstruct-rotated`` at a tied decoder whose stream has outlier channels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import fxquant
from fxquant import CalibrationError
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.migration.hadamard import hadamard, signed

VOCABULARY, WIDTH, INNER, HEADS, LAYERS = 40, 48, 464, 3, 1
OUTLIER, SCALE = 5, 100
HEAD_FLOAT: dict[str, Any] = {"sites": {"head": "float"}}


class Layer(nn.Module):
    """Attention and SwiGLU before which the stream is normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (each(y).view(*y.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2) for each in (self.q, self.k, self.v))
        x = x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))
        y = self.norm2(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """ids → logits, the head's weight that of the embedding; one channel is large, and what reads it small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers, self.norm = nn.Sequential(*(Layer() for _ in range(LAYERS))), nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.uniform_(p, 9, 12)
        with torch.no_grad():
            self.embedding.weight[:, OUTLIER] *= SCALE
            for name, p in self.named_parameters():
                if name.endswith(("q.weight", "k.weight", "v.weight", "gate.weight", "up.weight")):
                    p[:, OUTLIER] /= SCALE
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(ids))))  # type: ignore[no-any-return]


def batches() -> list[Tensor]:
    return list(torch.randint(VOCABULARY, (5, 4, 24), generator=torch.Generator().manual_seed(1)))


def calibrated(seed: int = 0) -> Calibration:
    return fxquant.calibrate(Decoder(), batches()[:-1], scheme="w8a8", method="quarot", options=HEAD_FLOAT, seed=seed)


@torch.no_grad()
def run(model: nn.Module, calibration: Calibration | None, x: Tensor, options: Any = HEAD_FLOAT) -> Tensor:
    torch._dynamo.reset()
    options = {**options, "codegen": "ops", "calibration": calibration}
    return torch.compile(model, backend="fxquant", options=options)(x)  # type: ignore[no-any-return]


def test_a_rotation_spreads_the_outliers_that_codes_of_a_token_suffer_from() -> None:
    model, x = Decoder(), batches()[-1]
    options: dict[str, Any] = {"sites": {"*.q": "w8a8", "*.v": "w8a8", "*.gate": "w8a8", "*.up": "w8a8", "*": "float"}}
    found = fxquant.calibrate(model, batches()[:-1], scheme="float", method="quarot", options=options)
    plain = fxquant.calibrate(model, batches()[:-1], scheme="float", options=options)
    assert all(found.sites[name] != site for name, site in plain.sites.items())
    with torch.no_grad():
        wanted = model(x)
    ours, dynamic = (float((run(model, known, x, options) - wanted).norm()) for known in (found, None))
    assert ours < 0.75 * dynamic


def test_the_search_after_a_rotation_has_shifts_and_factors_of_the_rotated_inputs() -> None:
    model, x = Decoder(), batches()[-1]
    found = fxquant.calibrate(model, batches()[:-1], scheme="w6a6", method="search-rotated", options=HEAD_FLOAT)
    assert found.vectors.keys() == calibrated().vectors.keys()
    assert all(site.migration is not None and site.migration.shift is not None for site in found.sites.values())
    plain = fxquant.calibrate(model, batches()[:-1], scheme="w6a6", method="quarot", options=HEAD_FLOAT)
    with torch.no_grad():
        wanted = model(x)
    ours, without = (float((run(model, known, x) - wanted).norm()) for known in (found, plain))
    assert ours < without


def test_reconstruction_after_a_rotation_has_the_rotation_and_less_error_than_gptq_after_it() -> None:
    model, x = Decoder(), batches()[-1]
    found, plain = (
        fxquant.calibrate(model, batches()[:-1], scheme="w4a16-g16", method=method, options=HEAD_FLOAT)
        for method in ("reconstruct-rotated", "quarot")
    )
    assert found.vectors.keys() == plain.vectors.keys() != set()
    with torch.no_grad():
        wanted = model(x)
    ours, without = (float((run(model, known, x) - wanted).norm()) for known in (found, plain))
    assert ours < without


def test_a_calibration_of_a_rotated_decoder_is_reproduced_by_its_seed_and_from_its_file(tmp_path: Path) -> None:
    model, x = Decoder(), batches()[-1]
    found = calibrated()
    assert found == calibrated()
    assert found != calibrated(seed=1)
    found.save(tmp_path / "file.safetensors")
    loaded = Calibration.load(tmp_path / "file.safetensors")
    assert loaded == found
    result = run(model, loaded, x)
    assert torch.equal(result, run(model, found, x))
    with torch.no_grad():
        assert float((result - model(x)).norm() / model(x).norm()) < 0.05


def test_the_codes_are_those_of_rotated_weights_and_the_report_says_what_was_turned() -> None:
    found, model = calibrated(), Decoder().requires_grad_(False)
    (stream,) = found.vectors["rotation"].values()
    assert torch.equal(stream["rotation"], signed(WIDTH, 0))
    assert len(found.vectors["value_rotation"]) == LAYERS
    turn, head = (signed(n, 0).double() / n**0.5 for n in (WIDTH, WIDTH // HEADS))
    heads: Tensor = torch.block_diag(*[head] * HEADS)
    layer: Any = model.layers[0]
    wanted = {
        "gate": layer.gate.weight.double() * layer.norm2.weight.double() @ turn,
        "down": turn.T @ layer.down.weight.double(),
        "o": turn.T @ layer.o.weight.double() @ heads,
        "v": heads.T @ (layer.v.weight.double() * layer.norm1.weight.double()) @ turn,
    }
    for name, weight in wanted.items():
        codes = found.sites[f"layers.0.{name}:linear"].codes
        assert codes is not None
        assert float((codes.value - weight).norm() / weight.norm()) < 0.02, name
    report = fxquant.explain(model, batches()[0], options={**HEAD_FLOAT, "calibration": found})
    rows = {row.name: row.scheme for row in report.sites}
    assert {name for name in rows if name.endswith("matmul")} == {"embedding:matmul", "layers.0:matmul"}
    assert {row.scheme for row in report.sites if row.kind == "linear" and row.name != "head:linear"} == {"w8a8"}


class PostNorm(nn.Module):
    """A branch whose norm stands behind the add."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.first(x))
        return x + self.second(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (PostNorm(), "the norm of a stream must be read by linears alone, and add reads it"),
        (nn.Linear(WIDTH, WIDTH), "no norm reads a stream here"),
    ],
)
def test_a_model_without_a_stream_to_rotate_is_refused_with_the_reason(model: nn.Module, reason: str) -> None:
    with pytest.raises(CalibrationError, match=f"quarot can rotate no stream of this model: {reason}.* use the method gptq"):
        fxquant.calibrate(model, [torch.randn(6, WIDTH)], scheme="w8a8", method="quarot")


@pytest.mark.parametrize("shape", [(48, 48), (46, 2)])
def test_signed_matrices_are_whole_and_orthogonal_also_in_blocks(shape: Sequence[int]) -> None:
    n, block = shape
    matrix = signed(n, 3)
    assert set(matrix.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(matrix.T @ matrix, block * torch.eye(n))
    if block == n:
        assert torch.equal(matrix.abs(), hadamard(n).abs().float())
        assert torch.equal(matrix * matrix[:, :1], hadamard(n).float() * hadamard(n)[:, :1].float())
    assert torch.equal(matrix, signed(n, 3))
    assert not torch.equal(matrix, signed(n, 4))


def test_the_outlier_of_one_channel_spreads_over_all() -> None:
    """The worked example: [8, .1, -.2, .1] H / 2 has its peak at 4.1."""
    x = torch.tensor([8, 0.1, -0.2, 0.1])
    peaks = {round(float((x @ signed(4, seed) / 2).abs().max()), 4) for seed in range(20)}
    assert max(peaks) <= 4.2
    assert 4.1 in peaks
    assert float(rms_norm(x @ signed(4, 0) / 2, (4,)).norm()) == pytest.approx(float(rms_norm(x, (4,)).norm()))
