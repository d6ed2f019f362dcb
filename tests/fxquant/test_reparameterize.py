"""The stage reparameterize of the compiler: folds by name, vectors by a calibration, bound as packed weights are."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.sources import ANOTHER
from fxquant.calibration.study import Study
from fxquant.config import FxQuantConfig
from fxquant.errors import CalibrationError, ConfigError
from fxquant.passes.joint import RESIDUAL
from fxquant.passes.reparam.legality import UNTIED

TOLERANCE = 2e-5
QUANTIZED = 0.1  # 8-bit codes in a block or two
FLOAT: dict[str, Any] = {"scheme": "float", "float_kernels": "off", "attention": "off", "codegen": "ops"}
W8A8: dict[str, Any] = {**FLOAT, "scheme": "w8a8", "attention": "auto"}
FOLDS = ("norm_affine", "layer_scale", "attention_scale")
WIDTH, LAYERS = 64, 2


class Block(nn.Module):
    """A pre-norm block of a vision transformer with LayerScale."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale1, self.scale2 = (nn.Parameter(torch.rand(WIDTH) + 0.5) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm1(x)
        q, k, v = (y(normal).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for y in (self.q, self.k, self.v))
        x = x + self.scale1 * self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


def norm_linear() -> nn.Sequential:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32))
    for parameter in model[0].parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def data() -> Tensor:
    return torch.randn(2, 7, WIDTH)


def compiled(model: Any, options: dict[str, Any], **more: Any) -> Any:
    return torch.compile(model, backend="fxquant", options={**options, **more})


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def rewrites(report: Any) -> dict[str, list[str | None]]:
    """Rule → refusals of the stage, None where it fired."""
    found: dict[str, list[str | None]] = {}
    for row in (row for graph in report.graphs for row in graph.rewrites):
        if row.stage == "reparameterize":
            found.setdefault(row.rule, []).append(row.reason)
    return found


def notes(fast: Any) -> list[str]:
    return [note for graph in fxquant.report(fast).graphs for note in graph.notes]


ALL_FIRED = {"layer_scale": [None] * 2, "attention_scale": [None], "norm_affine": [None] * 4}


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_folds_of_a_vision_block_leave_the_function_as_it_is(codegen: str) -> None:
    model, x = Block(), data()
    fast = compiled(model, FLOAT, reparameterize=FOLDS, codegen=codegen)
    assert error(fast(x), model(x)) < TOLERANCE
    report = fxquant.report(fast)
    assert rewrites(report) == ALL_FIRED
    assert [row.name for row in report.graphs[0].stages][:4] == ["capture", "recognise", "reparameterize", "plan"]


@torch.no_grad()
@pytest.mark.parametrize("chains", [True, False])
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_folded_weights_are_quantized(codegen: str, chains: bool) -> None:
    model, x = Block(), data()
    fast = compiled(model, W8A8, reparameterize=FOLDS, codegen=codegen, chains=chains)
    assert error(fast(x), model(x)) < QUANTIZED
    report = fxquant.report(fast)
    assert rewrites(report) == ALL_FIRED
    linears = {row.name: row for row in report.sites if row.kind == "linear"}
    assert linears.keys() == {f"{name}:linear" for name in ("q", "k", "v", "o", "fc1", "fc2")}
    assert {row.scheme for row in linears.values()} == {"w8a8"}
    assert {row.weight for row in linears.values()} == {f"{name}.weight" for name in ("q", "k", "v", "o", "fc1", "fc2")}


@torch.no_grad()
@pytest.mark.parametrize("options", [FLOAT, W8A8], ids=["float", "w8a8"])
def test_what_is_folded_is_not_computed_at_each_call(options: dict[str, Any], tmp_path: Path) -> None:
    compiled(norm_linear(), options, reparameterize=["norm_affine"], dump=str(tmp_path))(data())
    (before,) = [path.read_text() for path in tmp_path.rglob("*-reparameterize.py")]
    (after,) = [path.read_text() for path in tmp_path.rglob("*-fuse.py")]
    assert "aten.mul" in before
    assert "aten.matmul" in before
    assert "aten.mul" not in after
    assert "aten.matmul" not in after
    assert "folded_" in after


@torch.no_grad()
@pytest.mark.parametrize("options", [FLOAT, W8A8], ids=["float", "w8a8"])
def test_a_write_to_any_source_of_a_folded_weight_is_seen(options: dict[str, Any]) -> None:
    model, x = Block(), data()
    fast = compiled(model, options, reparameterize=FOLDS)
    limit = TOLERANCE if options is FLOAT else QUANTIZED
    for parameter in (model.norm1.weight, model.norm1.bias, model.scale2, model.fc2.bias, model.q.weight):
        before = fast(x)
        parameter.mul_(-3)
        assert not torch.equal(fast(x), before)
        assert torch.equal(fast(x), compiled(copy.deepcopy(model), options, reparameterize=FOLDS)(x))
        assert error(fast(x), model(x)) < limit


@torch.no_grad()
def test_layers_that_share_a_graph_keep_their_own_weights() -> None:
    layers, x = [norm_linear() for _ in range(3)], data()
    for layer in layers:
        layer.compile(backend="fxquant", options={**FLOAT, "reparameterize": ("norm_affine",)})
    for _ in range(2):
        for layer in layers:
            assert error(layer(x), layer.forward(x)) < TOLERANCE


@torch.no_grad()
def test_calibration_runs_layers_that_share_a_graph_with_their_own_weights() -> None:
    layers, x = [norm_linear() for _ in range(3)], data()

    def model(x: Tensor) -> Tensor:
        out = torch.zeros(())
        for layer in layers:
            out = out + layer(x).square().sum()
            torch._dynamo.graph_break()
        return out

    study = Study(model, FxQuantConfig(scheme="w8a8", reparameterize=("norm_affine",)))
    for _ in range(2):
        assert error(study(x), model(x)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_a_weight_that_cannot_be_packed_any_more_is_folded_in_float(codegen: str) -> None:
    model, x = norm_linear(), data()
    fast = compiled(model, W8A8, reparameterize=("norm_affine",), codegen=codegen)
    assert error(fast(x), model(x)) < QUANTIZED
    model.get_parameter("1.weight")[3, 5] = float("nan")
    got, wanted = fast(x), model(x)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert error(got.nan_to_num(), wanted.nan_to_num()) < TOLERANCE


@torch.no_grad()
def test_norms_of_bert_stay_and_its_queries_take_up_the_scale() -> None:
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=99,
        attn_implementation="sdpa",
    )
    model, tokens = BertModel(config).eval(), torch.arange(9)[None] * 3
    fast = compiled(model, FLOAT, reparameterize=FOLDS)
    assert error(fast(input_ids=tokens)[0], model(input_ids=tokens)[0]) < TOLERANCE
    found = rewrites(fxquant.report(fast))
    assert found["attention_scale"] == [None] * LAYERS
    assert RESIDUAL in found["norm_affine"], "BERT carries on what its norms leave"
    assert None not in found["norm_affine"]
    assert "reparameterize: layer_scale finds nothing to change here" in notes(fast)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_folds_its_norms_unless_the_head_is_tied(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    model, tokens = LlamaForCausalLM(config).eval(), torch.arange(7)[None] * 3
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    fast = compiled(model, FLOAT, reparameterize=("norm_affine",))
    wanted = model(input_ids=tokens, use_cache=False).logits
    assert error(fast(input_ids=tokens, use_cache=False).logits, wanted) < 1e-4
    found = rewrites(fxquant.report(fast))["norm_affine"]
    assert found.count(None) == 5 * LAYERS + (not tied)
    assert [reason for reason in found if reason is not None] == [UNTIED] * tied


@torch.no_grad()
def test_vectors_of_a_calibration_are_bound_and_survive_a_file(tmp_path: Path) -> None:
    model, x, factor = Block(), data(), torch.rand(WIDTH) + 0.5
    vectors = {"smooth": {f"{name}:linear": {"factor": factor} for name in "qkv"}}
    calibration = Calibration("by hand", 1, {}, reparameterize=("layer_scale",), vectors=vectors)
    calibration.save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    assert loaded == calibration
    assert loaded != Calibration("by hand", 1, {}, reparameterize=("layer_scale",))
    fast = compiled(model, FLOAT, calibration=loaded)
    assert error(fast(x), model(x)) < TOLERANCE
    assert rewrites(fxquant.report(fast)) == {"layer_scale": [None] * 2, "smooth": [None] * 3}
    model.norm1.bias.add_(2)
    assert error(fast(x), model(x)) < TOLERANCE
    ranked = fxquant.rank_errors(model, [x], scheme="w8a8", options={"calibration": loaded})
    assert len(ranked.rows) == 6


@torch.no_grad()
def test_vectors_that_hold_for_one_layer_alone_are_left_out() -> None:
    model, x = Block(), data()
    given = {"fc1:linear": {"basis": torch.eye(2 * WIDTH)[:, :8], "mean": torch.zeros(2 * WIDTH)}}
    fast = compiled(model, FLOAT, calibration=Calibration("by hand", 1, {}, vectors={"low_rank": given}))
    assert error(fast(x), model(x)) < TOLERANCE
    assert f"reparameterize: low_rank at fc1:linear {ANOTHER}" in notes(fast)


@torch.no_grad()
def test_a_calibration_is_used_with_the_folds_that_it_was_made_with() -> None:
    model, x = Block(), data()
    plain = fxquant.calibrate(model, [x], scheme="w8a8")
    calibration = fxquant.calibrate(model, [x], scheme="w8a8", options={"reparameterize": FOLDS})
    assert calibration.reparameterize == FOLDS
    assert calibration.sites.keys() == plain.sites.keys()
    for site in ("q:linear", "fc1:linear"):
        assert calibration.sites[site].static != plain.sites[site].static, "its input comes from a norm without γ and β"
    report = fxquant.explain(model, x, options={"scheme": "w8a8", "calibration": calibration})
    assert rewrites(report) == ALL_FIRED
    before = fxquant.explain(model, x, options={"scheme": "w8a8", "calibration": plain})
    assert [row.name for row in report.sites] == [row.name for row in before.sites]
    assert {row.name for row in report.sites if row.kind == "linear"} == calibration.sites.keys()
    fast = compiled(model, W8A8, calibration=calibration)
    assert error(fast(x), model(x)) < QUANTIZED
    assert rewrites(fxquant.report(fast)) == ALL_FIRED
    assert FxQuantConfig(calibration=calibration, reparameterize=FOLDS[::-1]).folds == FOLDS[::-1]
    for known in (plain, calibration):
        with pytest.raises(CalibrationError, match=r"was made with reparameterize=\[.*the options say \['rep_batch_norm'\]"):
            FxQuantConfig(calibration=known, reparameterize=["rep_batch_norm"])


def test_names_are_checked() -> None:
    assert FxQuantConfig(reparameterize=["norm_affine"]) == FxQuantConfig(reparameterize=("norm_affine",))
    with pytest.raises(ConfigError, match="unknown reparameterization 'norm_afine'; did you mean 'norm_affine'"):
        FxQuantConfig(reparameterize=["norm_afine"])
    with pytest.raises(ConfigError, match="'smooth' needs vectors of data"):
        FxQuantConfig(reparameterize=["smooth"])
    with pytest.raises(ConfigError, match="option 'reparameterize'"):
        FxQuantConfig(reparameterize="norm_affine")


@torch.no_grad()
def test_a_calibration_of_vectors_alone_belongs_to_the_model_that_has_their_sites() -> None:
    model, x, factor = Block(), data(), torch.rand(WIDTH) + 0.5
    vectors = {"smooth": {f"{name}:linear": {"factor": factor} for name in "qkv"}}
    fast = compiled(model, W8A8, calibration=Calibration("by hand", 1, {}, vectors=vectors))
    assert error(fast(x), model(x)) < QUANTIZED
    assert rewrites(fxquant.report(fast)) == {"smooth": [None] * 3}
    with pytest.raises(Exception, match="a calibration of another model: it knows 'q:linear', 'k:linear', 'v:linear'"):
        compiled(norm_linear(), W8A8, calibration=Calibration("by hand", 1, {}, vectors=vectors))(x)
