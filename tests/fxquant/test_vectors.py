"""Vectors of migrations: found from data, kept by a calibration, bound to the weights that they are of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant import CalibrationError, ConfigError
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.sources import ANOTHER
from fxquant.calibration.vectors import RULES

WIDTH, HIDDEN = 32, 96
FLOAT: dict[str, Any] = {"scheme": "float", "float_kernels": "off", "attention": "off", "codegen": "ops"}
SETTINGS: dict[str, Any] = {
    "smooth": 0.5,
    "exponent_shift": 4,
    "one_scale": 8,
    "value_scale": 0.5,
    "rotary_scale": 2.0,
    "low_rank": {"down_proj": 8, "narrow": 8},
}


class Block(nn.Module):
    """Pre-norm, with channels of unlike range behind the norm, and values of unlike range."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        with torch.no_grad():
            for norm in (self.norm, self.after):
                norm.weight.mul_(torch.logspace(-1, 1, WIDTH))
                norm.bias.add_(torch.randn(WIDTH))
            self.v.weight.mul_(torch.logspace(-1, 1, WIDTH)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (linear(y).view(*x.shape[:2], 4, WIDTH // 4).transpose(1, 2) for linear in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        out: Tensor = x + self.narrow(F.gelu(self.wide(self.after(x))))
        return out


def vision() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Block().eval(), [torch.randn(2, 40, WIDTH) for _ in range(4)]


def decoder() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "vocab_size": 30, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, **heads, attn_implementation="sdpa")
    return LlamaForCausalLM(config).eval(), [{"input_ids": torch.randint(30, (2, 9)), "use_cache": False} for _ in range(4)]


def compiled(model: nn.Module, calibration: Calibration, **options: Any) -> Any:
    torch._dynamo.reset()
    given: dict[str, Any] = {**FLOAT, "calibration": calibration, **options}
    return torch.compile(model, backend="fxquant", options=given)


def error(got: Any, wanted: Any) -> float:
    got, wanted = (each.logits if hasattr(each, "logits") else each for each in (got, wanted))
    return float((got - wanted).square().mean() / wanted.square().mean())


def call(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


def fired(fast: Any) -> dict[str, int]:
    rows = [
        row for graph in fxquant.report(fast).graphs for row in graph.rewrites if row.stage == "reparameterize" and row.fired
    ]
    return {row.rule: sum(each.rule == row.rule for each in rows) for row in rows}


@pytest.mark.parametrize(
    ("make", "rule", "times"),
    [
        (vision, "smooth", 4),
        (vision, "exponent_shift", 4),
        (vision, "one_scale", 4),
        (vision, "value_scale", 1),
        (decoder, "smooth", 5),
        (decoder, "value_scale", 1),
        (decoder, "rotary_scale", 1),
    ],
)
def test_migrations_that_data_ask_for_keep_the_function(make: Any, rule: str, times: int, tmp_path: Path) -> None:
    model, batches = make()
    vectors = fxquant.find_vectors(model, batches, {rule: SETTINGS[rule]})
    calibration = fxquant.calibrate(model, batches, scheme="w8a8", vectors=vectors)
    calibration.save(tmp_path / "file")
    fast = compiled(model, Calibration.load(tmp_path / "file"))
    assert error(call(fast, batches[0]), call(model, batches[0])) < 1e-10
    assert fired(fast) == {rule: times}
    assert calibration != fxquant.calibrate(model, batches, scheme="w8a8")


@pytest.mark.parametrize(("make", "rule"), [(vision, "smooth"), (vision, "exponent_shift"), (vision, "value_scale")])
def test_what_moves_makes_codes_of_few_bits_finer(make: Any, rule: str) -> None:
    model, batches = make()
    vectors = fxquant.find_vectors(model, batches, {rule: SETTINGS[rule]})
    options: dict[str, Any] = {"scheme": "w8a4"}
    plain, moved = (fxquant.calibrate(model, batches, method="mse", vectors=each, **options) for each in (None, vectors))
    errors = [error(call(compiled(model, each, **options), batches[0]), call(model, batches[0])) for each in (plain, moved)]
    assert errors[1] < errors[0]


def test_smoothquants_factor_is_that_of_its_formula() -> None:
    model, batches = vision()
    found = fxquant.find_vectors(model, batches, {"smooth": 0.25})["smooth"]
    assert found.keys() == {f"{name}:linear" for name in ("q", "k", "v", "wide")}
    assert found["q:linear"]["factor"] is found["v:linear"]["factor"]
    absmax = torch.cat([model.get_submodule("norm")(x) for x in batches]).abs().amax((0, 1))
    weight = torch.cat([model.get_parameter(f"{name}.weight") for name in "qkv"]).abs().amax(0)
    torch.testing.assert_close(found["q:linear"]["factor"], absmax**0.25 / weight**0.75)


def test_a_low_rank_has_the_error_that_its_data_tell_and_thin_linears_are_calibrated() -> None:
    model, batches = vision()
    vectors = fxquant.find_vectors(model, batches, {"low_rank": {"narrow": 8}})
    calibration = fxquant.calibrate(model, batches, scheme="w8a8", vectors=vectors)
    assert {name: site.shape for name, site in calibration.sites.items() if "narrow" in name} == {
        "narrow:linear": (8, HIDDEN),
        "narrow:linear#2": (WIDTH, 8),
    }
    fast, plain = compiled(model, calibration), fxquant.calibrate(model, batches, scheme="w8a8")
    lost = sum(float((call(fast, x) - call(model, x)).square().sum()) for x in batches) / sum(
        x.shape[0] * x.shape[1] for x in batches
    )
    outputs = torch.cat([_narrow(model, x) for x in batches]).flatten(0, 1).double()
    left_out = torch.linalg.eigvalsh(outputs.T.cov(correction=0))[: WIDTH - 8].sum()
    assert lost == pytest.approx(float(left_out), rel=1e-3)
    assert fired(fast) == {"low_rank": 1}
    eight, fast8 = (compiled(model, each, scheme="w8a8") for each in (plain, calibration))
    whole = [error(call(each, batches[0]), call(model, batches[0])) for each in (eight, fast8)]
    assert whole[0] < whole[1] < 1.1 * error(call(compiled(model, calibration), batches[0]), call(model, batches[0])) + whole[0]


def _narrow(model: nn.Module, x: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = model.get_submodule("narrow").register_forward_hook(lambda module, args, out: kept.append(out))
    call(model, x)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_a_layer_that_shares_the_graph_has_no_low_rank_of_another(codegen: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = nn.Sequential(*[Block() for _ in range(2)]).eval()
    x = torch.randn(2, 40, WIDTH)
    vectors = fxquant.find_vectors(layers[0], [x], {"low_rank": {"narrow": 8}})
    calibration = Calibration("by hand", 1, {}, vectors=vectors)
    for order in ((0, 1), (1, 0)):
        torch._dynamo.reset()
        options: dict[str, Any] = {**FLOAT, "scheme": "w8a8", "calibration": calibration, "codegen": codegen}
        fast = {i: torch.compile(layers[i], backend="fxquant", options=options) for i in order}
        errors = {i: error(call(fast[i], x), call(layers[i], x)) for i in order}
        notes = " ".join(note for graph in fxquant.report(fast[1]).graphs for note in graph.notes)
        assert ANOTHER in notes
        assert errors[1] < 1e-3
        assert (errors[0] > 1e-3) == (order == (0, 1))  # whose graph it is: left out for both where it came second
        if order == (0, 1):
            with torch.no_grad():
                layers[0].get_parameter("narrow.weight").mul_(2)  # an update of the weights
            assert error(call(fast[0], x), call(layers[0], x)) < 1e-3
            with torch.no_grad():
                layers[0].get_parameter("narrow.weight").mul_(0.5)
            assert error(call(fast[0], x), call(layers[0], x)) > 1e-3


def test_bad_settings_are_refused_by_name() -> None:
    model, batches = vision()
    for settings, sentence in (
        ({"smoth": 0.5}, f"no rule is called 'smoth'; known: {', '.join(RULES)}"),
        ({"smooth": 2}, r"smooth takes α of 0 .. 1, not 2"),
        ({"smooth": "a"}, "smooth takes"),
        ({"one_scale": 9}, "one_scale takes bits"),
        ({"low_rank": 4}, "low_rank takes a mapping"),
        ({"low_rank": {"narrow": 1.5}}, "low_rank takes"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            fxquant.find_vectors(model, batches, settings)
    with pytest.raises(CalibrationError, match="low_rank: 'narow' names no linear that ran"):
        fxquant.find_vectors(model, batches, {"low_rank": {"narow": 4}})
    with pytest.raises(CalibrationError, match=r"narrow:linear: a weight .* has ranks 1 .. 32, not 40"):
        fxquant.find_vectors(model, batches, {"low_rank": {"narrow": 40}})
    with pytest.raises(CalibrationError, match="there is no batch"):
        fxquant.find_vectors(model, [], {"smooth": 0.5})
    with pytest.raises(CalibrationError, match=r"q:linear"):
        fxquant.find_vectors(model, [torch.full((1, 4, WIDTH), torch.nan)], {"smooth": 0.5})


def test_a_stopped_calibration_goes_on_with_its_own_vectors_alone(tmp_path: Path) -> None:
    model, batches = vision()
    vectors, file = fxquant.find_vectors(model, batches, {"smooth": 0.5}), tmp_path / "kept"

    def interrupted() -> Any:
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxquant.calibrate(model, interrupted(), scheme="w8a8", vectors=vectors, checkpoint=file)
    with pytest.raises(CalibrationError, match="is of another run"):
        fxquant.calibrate(model, batches, scheme="w8a8", checkpoint=file)
    found = fxquant.calibrate(model, batches, scheme="w8a8", vectors=vectors, checkpoint=file)
    assert found == fxquant.calibrate(model, batches, scheme="w8a8", vectors=vectors)
