"""Weights rounded behind the quantized part of a model: what it gains, that it repeats, that it can be stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import CalibrationError, reference
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.reconstruction.block import Block, Learning, learn_block
from fxquant.calibration.reconstruction.coded import CodedLinear, as_overrides
from fxquant.calibration.reconstruction.early_stop import EarlyStop
from fxquant.calibration.reconstruction.order import block_of
from fxquant.calibration.reconstruction.sos import Stages, tune_codes, tune_weights
from fxquant.calibration.reconstruction.walk import advance_all, walks
from fxquant.calibration.rounding import refitted
from fxquant.calibration.rounding.grid import encode
from fxquant.calibration.run import run
from fxquant.calibration.seen import Seen, see
from fxquant.calibration.site import SiteCalibration, WeightCodes
from fxquant.calibration.study import Study
from fxquant.config import override_options
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
    assert error(model, calibrated("reconstruct", scheme), unseen) < 0.9 * alone  # rounded by half of the batches


def test_scales_are_tuned_on_batches_that_the_rounding_has_not_seen() -> None:
    model, batches, _ = model_and_batches()
    others = [x if i % 2 == 0 else x.flip(0) * 2 for i, x in enumerate(batches)]
    found, changed = (fxquant.calibrate(model, each, scheme="w4a16-g16", method="reconstruct") for each in (batches, others))
    pairs = [(_codes(site), _codes(changed.sites[name])) for name, site in found.sites.items()]
    assert all(torch.equal(one.codes, other.codes) for one, other in pairs)
    assert not all(torch.equal(one.scale, other.scale) for one, other in pairs)


@pytest.mark.parametrize(("method", "search"), [("reconstruct", "search"), ("reconstruct-static", "search-static")])
def test_activations_are_those_of_the_search_and_the_error_is_below_its_own(method: str, search: str) -> None:
    model, _, unseen = model_and_batches()
    found, searched = (calibrated(each, "w4a8") for each in (method, search))
    for name, site in found.sites.items():
        assert (site.static, site.migration) == (searched.sites[name].static, searched.sites[name].migration)
        assert site.migration is not None
    assert error(model, found, unseen) < 0.9 * error(model, searched, unseen)


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


@pytest.mark.parametrize(("method", "at", "resumed"), [("sequential", 4, [2, 3]), ("qdrop", 3, [2, 3])])
def test_a_stopped_reconstruction_goes_on_behind_the_last_block(
    method: str, at: int, resumed: list[int], tmp_path: Path
) -> None:
    model, batches, _ = model_and_batches()
    config: Any = {"scheme": "w2a16-g16", "method": method, "budget": None, "options": None, "seed": 0}
    file, heard = tmp_path / "kept.safetensors", []

    def stop(what: str, done: int, total: int | None) -> None:
        if what == "rounding sites" and done == at:
            raise KeyboardInterrupt

    def listen(what: str, done: int, total: int | None) -> None:
        heard.append((what, done, total))

    with pytest.raises(KeyboardInterrupt):
        run(model, batches, checkpoint=file, progress=stop, **config)
    found = run(model, batches, checkpoint=file, progress=listen, **config)
    first = [done for what, done, _ in heard if what == "rounding sites"]
    assert first[:2] == resumed  # the first block at once, then site by site
    assert found == run(model, batches, checkpoint=None, progress=listen, **config)
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


def test_making_up_for_errors_is_held_back_where_it_does_not_hold_on_unseen_rows() -> None:
    """Few rows and many inputs: what fits their errors says nothing of others, so the wanted output is left alone."""
    torch.manual_seed(0)
    weight, noise = torch.randn(8, 32), 5 * torch.randn(80, 8)
    rows = torch.randn(80, 32)

    def part(which: slice, goal: Tensor) -> Seen:
        x = rows[which].double()
        missing = 2 / len(x) * x.T @ (goal[which] - rows[which] @ weight.T).double()
        return replace(see(rows[which]), missing=missing)

    exact, first, last = rows @ weight.T, slice(0, 40), slice(40, 80)
    ridges = [refitted.choose_ridge(part(first, goal), part(last, goal)) for goal in (exact + noise, 1.5 * exact)]
    assert ridges[1] == min(refitted.RIDGES)
    assert ridges[0] > 10 * ridges[1]


def test_early_stop_keeps_the_best_and_ends_without_gain() -> None:
    stop = EarlyStop(2)
    for value, state in ((1.0, "a"), (0.5, "b"), (0.4999, "c"), (0.6, "d")):
        assert not stop.is_over
        stop.measure(value, state)
    assert stop.is_over
    assert (stop.best, stop.error) == ("c", 0.4999)


def first_block(method: str, scheme: str) -> Block:
    """The first block before which the walks stand, its sites as the method codes them."""
    model, batches, _ = model_and_batches()
    study = Study(model, override_options(None, scheme=scheme, calibration=None))
    found = calibrated(method, scheme).sites
    pairs = [(walk, walk.fork()) for walk in walks(study, batches, method)]
    linears = {name: CodedLinear(study.sites[name], site) for name, site in found.items()}
    return Block(pairs, lambda walk: walk.places["1.wide:linear"], linears, {n: s for n, s in found.items() if n[0] == "0"})


def test_learning_beats_nearest_codes_and_takes_nothing_that_measured_no_better() -> None:
    block = first_block("sequential", "w2a8")
    nearest = _nearest(block, {name: block.linears[name].weight for name in block.found}, 2)
    learned = learn_block(replace(block, found=nearest), Learning(), 0, lambda step, steps: None)
    assert learned is not None
    assert _handed_on_error(block, learned) < 0.85 * _handed_on_error(block, nearest)
    assert learn_block(replace(block, found=nearest), Learning(rate=0.0), 0, lambda step, steps: None) is None


def test_sos_tunes_codes_of_a_block_under_their_scales() -> None:
    block = first_block("sequential", "w4a4")
    stages, steps = Stages(steps=80, rate=1e-4, check_every=20), []
    with torch.no_grad():
        weights = tune_weights(block, stages, 0, lambda step, total: steps.append(step))
        coded = tune_codes(block, weights, stages, 0, lambda step, total: steps.append(step))
    assert steps[-1] == 80
    shapes = {name: block.linears[name].weight.shape for name in block.found}
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    errors = [_handed_on_error(block, sites) for sites in (_nearest(block, weights, 4), coded)]
    assert errors[1] < 0.95 * errors[0]
    for name, site in coded.items():
        assert torch.equal(_codes(site).scale, _codes(block.found[name]).scale)


def _codes(site: SiteCalibration) -> WeightCodes:
    assert site.codes is not None
    return site.codes


def _nearest(block: Block, weights: dict[str, Tensor], bits: int) -> dict[str, SiteCalibration]:
    scales = {name: _codes(site).scale for name, site in block.found.items()}
    return {name: block.linears[name].rounded(encode(weights[name], scales[name], bits, 0), scales[name]) for name in weights}


def _handed_on_error(block: Block, sites: dict[str, SiteCalibration]) -> float:
    total = 0.0
    for float_walk, coded_walk in block.pairs:
        wanted, got = float_walk.fork(), coded_walk.fork()
        advance_all(wanted.graph.study, [wanted], block.end, {})
        advance_all(got.graph.study, [got], block.end, as_overrides(block.linears, sites))
        total += sum(float((y - z).square().mean()) for y, z in zip(wanted.handed_on(0), got.handed_on(0), strict=True))
    return total
