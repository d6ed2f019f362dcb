"""Weights rounded behind the quantized part of a model: what it gains, that it repeats, that it can be stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CalibrationError, reference
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.recipes.base import Gathered
from fxquant.calibration.reconstruction.block import Block
from fxquant.calibration.reconstruction.coded import CodedLinear, as_overrides
from fxquant.calibration.reconstruction.dual_clip import Clipping, DualClip, learn
from fxquant.calibration.reconstruction.early_stop import EarlyStop
from fxquant.calibration.reconstruction.order import block_of
from fxquant.calibration.reconstruction.sos import Stages, tune_codes, tune_weights
from fxquant.calibration.reconstruction.walk import advance_all, walks
from fxquant.calibration.rounding import refitted
from fxquant.calibration.rounding.grid import encode
from fxquant.calibration.run import run
from fxquant.calibration.seen import see
from fxquant.calibration.site import SiteCalibration, WeightCodes
from fxquant.calibration.study import Study
from fxquant.config import override_options
from fxquant.formats import Uniform
from fxquant.lowering.pack import Codes, pack_codes
from fxquant.schemes import Scheme

BLOCKS = 3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        return out


def model_and_batches() -> tuple[nn.Module, list[Tensor], Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*[Residual() for _ in range(BLOCKS)])
    mix = torch.randn(32, 32) / 6 + torch.diag(torch.linspace(0.2, 2, 32))
    return model, [torch.randn(64, 32) @ mix for _ in range(8)], torch.randn(200, 32) @ mix


def error(model: nn.Module, calibration: Calibration, x: Tensor) -> float:
    torch._dynamo.reset()
    options: Any = {"codegen": "ops", "calibration": calibration}
    with torch.no_grad():
        wanted = model(x)
        got = torch.compile(model, backend="fxquant", options=options)(x)
    return float((got - wanted).square().mean() / wanted.square().mean())


def calibrated(method: str, scheme: str = "w4a16-g16", **more: Any) -> Calibration:
    model, batches, _ = model_and_batches()
    return fxquant.calibrate(model, batches, scheme=scheme, method=method, **more)


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a8"])
def test_behind_the_prefix_beats_each_linear_alone_on_unseen_data(scheme: str) -> None:
    model, _, unseen = model_and_batches()
    alone, behind = (error(model, calibrated(method, scheme), unseen) for method in ("gptq", "sequential"))
    assert behind < 0.9 * alone
    assert error(model, calibrated("reconstruct", scheme), unseen) < 1.05 * behind


@pytest.mark.parametrize("method", ["adaround", "qdrop"])
def test_learned_codes_are_no_worse_than_those_they_began_with_and_repeat(method: str) -> None:
    model, _, unseen = model_and_batches()
    found = calibrated(method)
    assert found == calibrated(method)
    assert error(model, found, unseen) < 1.1 * error(model, calibrated("sequential"), unseen)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512vnni"])
@pytest.mark.parametrize("scheme", [Scheme(4, 16, 32), Scheme(4, 8, 32), Scheme(2, 16, 32)])
def test_streamed_weights_have_every_code_of_their_width_and_signed_scales(
    scheme: Scheme, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxquant.lowering.isa import current_isa

    if current_isa() == "avx2" and isa == "avx512vnni":
        pytest.skip("this CPU has no AVX512-VNNI")
    monkeypatch.setenv("FXQUANT_ISA", isa)
    torch.manual_seed(0)
    end = 2 ** (scheme.weight_bits - 1)
    codes, scale = torch.randint(-end, end, (24, 96)).to(torch.int8), torch.randn(24, 3)
    codes[0] = -end
    packed = pack_codes(Codes(codes, scale, 32), scheme)
    x = torch.randn(5, 96)
    found = torch.ops.fxquant.linear_stream(x, packed, None, 24, scheme.weight_bits, scheme.act_bits, 32)
    if scheme.act_bits == 8:
        assert torch.equal(found, reference.linear_groups(x, codes, scale, None, 32))
    wanted = reference.fake_quant_per_token(x, 8) if scheme.act_bits == 8 else x
    torch.testing.assert_close(found, wanted @ reference.dequantize_weight(codes, scale, 32).T, rtol=1e-4, atol=1e-3)


def test_a_stopped_reconstruction_goes_on_behind_the_last_block(tmp_path: Path) -> None:
    model, batches, _ = model_and_batches()
    config: Any = {"scheme": "w4a16-g16", "method": "sequential", "budget": None, "options": None, "seed": 0}
    file, heard = tmp_path / "kept.safetensors", []

    def stop(what: str, done: int, total: int | None) -> None:
        if what == "rounding sites" and done == 4:
            raise KeyboardInterrupt

    def listen(what: str, done: int, total: int | None) -> None:
        heard.append((what, done, total))

    with pytest.raises(KeyboardInterrupt):
        run(model, batches, checkpoint=file, progress=stop, **config)
    found = run(model, batches, checkpoint=file, progress=listen, **config)
    assert found == run(model, batches, checkpoint=None, progress=listen, **config)
    first = [done for what, done, _ in heard if what == "rounding sites"]
    assert first[:2] == [2, 3]  # the first block at once, then site by site
    assert not file.exists()


def test_a_model_of_two_graphs_is_refused_by_name() -> None:
    def broken(x: Tensor) -> Tensor:
        x = first(x)
        torch._dynamo.graph_break()
        out: Tensor = second(x)
        return out

    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    with pytest.raises(CalibrationError, match=r"sequential follows one graph .* 2 graphs"):
        fxquant.calibrate(broken, [torch.randn(4, 32)], scheme="w4a8", method="sequential")


@pytest.mark.parametrize(
    ("name", "block"),
    [("model.layers.3.mlp.up:linear", "model.layers.3"), ("0.wide:linear", "0"), ("head:linear", "head:linear")],
)
def test_a_block_is_a_numbered_module(name: str, block: str) -> None:
    assert block_of(name) == block


def test_refitted_makes_up_for_what_the_output_misses() -> None:
    torch.manual_seed(0)
    wanted, weight = torch.randn(512, 32), torch.randn(24, 32)
    rows = wanted + 0.3 * torch.randn(512, 32) @ torch.randn(32, 32) / 6
    goal = wanted @ weight.T
    seen = see(rows)
    missing = 2 / len(rows) * rows.double().T @ (goal - rows @ weight.T).double()
    errors = []
    for each in (seen, type(seen)(seen.tokens, hessian=seen.hessian, missing=missing)):
        value = reference.dequantize_weight(*refitted.round_weight(weight, 8, 16, each), 16)
        errors.append(float((rows @ value.T - goal).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_early_stop_keeps_the_best_and_ends_without_gain() -> None:
    stop = EarlyStop(2)
    for value, state in ((1.0, "a"), (0.5, "b"), (0.4999, "c"), (0.6, "d")):
        assert not stop.is_over
        stop.measure(value, state)
    assert stop.is_over
    assert (stop.best, stop.error) == ("c", 0.4999)


def test_dual_clip_wide_open_is_min_max_and_learns_to_clip_an_outlier() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    low, high = x.amin(0), x.amax(0)
    form = Uniform(4)
    qparams = form.fit(x.T.contiguous())
    exact = form.fake_quant(x.T.contiguous(), qparams).T
    assert torch.equal(DualClip(low, high, 4, opening=1.0).fake_quant(x), exact)
    x[0, 2], weight = 9.0, torch.randn(8, 6)
    clip = DualClip(x.amin(0), x.amax(0), 4)
    stop = learn(clip, list(x.split(100)), lambda rows: rows @ weight.T, Clipping(drop=0.0, rate=0.05))
    assert stop.error < 0.9 * stop.measured[0]
    scale, _ = clip.qparams()
    assert float(scale.detach()[2]) < 0.9 * float((x[:, 2].amax() - x[:, 2].amin()) / 15)


def test_sos_tunes_codes_of_a_block_under_their_scales() -> None:
    model, batches, _ = model_and_batches()
    study = Study(model, override_options(None, scheme="w4a4", calibration=None))
    found = calibrated("sequential", "w4a4").sites
    pairs = [(walk, walk.fork()) for walk in walks(study, batches, "sos")]
    linears = {
        name: CodedLinear(Gathered(study.sites[name], None, {}), site)  # type: ignore[arg-type]
        for name, site in found.items()
    }
    block = Block(pairs, lambda walk: walk.places["1.wide:linear"], linears, {n: s for n, s in found.items() if n[0] == "0"})
    stages, steps = Stages(steps=80, rate=1e-4, check_every=20), []
    with torch.no_grad():
        weights = tune_weights(block, stages, 0, lambda step, total: steps.append(step))
        coded = tune_codes(block, weights, stages, 0, lambda step, total: steps.append(step))
    assert steps[-1] == 80
    shapes = {name: linears[name].weight.shape for name in block.found}
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    errors = [_handed_on_error(block, sites) for sites in (_nearest(block, weights), coded)]
    assert errors[1] < 0.95 * errors[0]
    for name, site in coded.items():
        assert torch.equal(_codes(site).scale, _codes(found[name]).scale)


def _codes(site: SiteCalibration) -> WeightCodes:
    assert site.codes is not None
    return site.codes


def _nearest(block: Block, weights: dict[str, Tensor]) -> dict[str, SiteCalibration]:
    scales = {name: _codes(site).scale for name, site in block.found.items()}
    return {name: block.linears[name].rounded(encode(weights[name], scales[name], 4, 0), scales[name]) for name in weights}


def _handed_on_error(block: Block, sites: dict[str, SiteCalibration]) -> float:
    total = 0.0
    for float_walk, coded_walk in block.pairs:
        wanted, got = float_walk.fork(), coded_walk.fork()
        advance_all(wanted.graph.study, [wanted], block.end, {})
        advance_all(got.graph.study, [got], block.end, as_overrides(block.linears, sites))
        total += sum(float((y - z).square().mean()) for y, z in zip(wanted.handed_on(0), got.handed_on(0), strict=True))
    return total
