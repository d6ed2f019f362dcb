"""Bad calibration data, files and schemes: a clear error that names the site or the batch, and nothing seen is lost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Budget, CalibrationError, ConfigError
from fxquant.calibration.calibration import Calibration
from fxquant.calibration.recipes import RECIPES


def model_and_batches(count: int = 5) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16)), [torch.randn(40, 24) for _ in range(count)]


class Overflowing(nn.Module):
    """Finite data may overflow on the way to the second linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.exp(self.first(x)))
        return y


def run(model: Any, x: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = torch.compile(model, backend="fxquant", options={"codegen": "ops", **options})(x)
    return y


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("budget", [None, Budget(cosine=0.9)])
def test_one_value_that_is_not_finite_is_found_and_its_site_is_named(value: float, budget: Budget | None) -> None:
    model, batches = model_and_batches()
    batches[3][7, 5] = value
    where = r"0:linear: the calibration data give an input that is not finite"
    with pytest.raises(CalibrationError, match=where if budget is not None else f"batch 4: {where}"):
        fxquant.calibrate(model, batches, budget=budget)


def test_an_overflow_inside_the_model_is_named_by_the_site_that_reads_it() -> None:
    torch.manual_seed(0)
    model, (good, bad) = Overflowing(), (torch.randn(8, 24), torch.full((8, 24), 1e4))
    with pytest.raises(CalibrationError, match=r"batch 2: second:linear: .* not finite"):
        fxquant.calibrate(model, [good, bad], scheme="w8a8")


@pytest.mark.parametrize("method", ["minmax", "percentile", "search"])
def test_a_bad_batch_counts_as_none_and_what_was_seen_before_it_is_kept(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Overflowing(), [torch.randn(40, 24) for _ in range(4)]
    file = tmp_path / "seen.safetensors"
    bad = [*batches[:2], torch.full((8, 24), 1e4), *batches[2:]]  # the first linear has seen it when the second refuses it
    with pytest.raises(CalibrationError, match="batch 3: second:linear"):
        fxquant.calibrate(model, bad, scheme="w6a6", method=method, checkpoint=file)
    ran = []
    model.first.register_forward_hook(lambda *given: ran.append(1))
    found = fxquant.calibrate(model, batches, scheme="w6a6", method=method, checkpoint=file)
    model.first._forward_hooks.clear()
    assert found == fxquant.calibrate(model, batches, scheme="w6a6", method=method)


def test_a_site_that_only_early_batches_reach_is_not_lost(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, is_early: bool) -> Tensor:
            y: Tensor = self.early(x) if is_early else self.late(x)
            return y

    torch.manual_seed(0)
    model, file = Branches(), tmp_path / "seen.safetensors"
    batches = [(torch.randn(5, 8), i < 2) for i in range(5)]

    def stopped() -> Iterator[Any]:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxquant.calibrate(model, stopped(), scheme="w8a8", checkpoint=file)
    found = fxquant.calibrate(model, batches, scheme="w8a8", checkpoint=file)
    assert found == fxquant.calibrate(model, batches, scheme="w8a8")
    assert set(found.sites) == {"early:linear", "late:linear"}


def test_a_site_that_never_runs_stays_dynamic_and_says_why() -> None:
    model, batches = model_and_batches()
    half = fxquant.calibrate(model[:2], batches, scheme="w8a8")
    options: dict[str, Any] = {"codegen": "ops", "scheme": "w8a8", "calibration": half}
    compiled = torch.compile(model, backend="fxquant", options=options)
    with torch.no_grad():
        compiled(batches[0])
    reasons = {row.name: row.reason for row in fxquant.report(compiled).sites if row.kind == "linear"}
    assert reasons["2:linear"] == "dynamic: the calibration has no site of this name"


def test_a_calibration_of_another_model_names_the_sites_of_both() -> None:
    model, batches = model_and_batches()
    other = fxquant.calibrate(nn.ModuleDict({"head": nn.Linear(24, 8)})["head"], batches, scheme="w8a8")
    renamed = Calibration(other.method, other.batches, {"decoder.head:linear": next(iter(other.sites.values()))})
    with pytest.raises(Exception, match=r"another model: it knows 'decoder.head:linear', and this graph has '0:linear'"):
        run(model, batches[0], scheme="w8a8", calibration=renamed)


@pytest.mark.parametrize("batches", [torch.randn(4, 24), {"x": torch.randn(4, 24)}, "text", 3, None])
def test_one_batch_or_none_in_the_place_of_batches_is_named(batches: Any) -> None:
    with pytest.raises(CalibrationError, match=f"batches is a {type(batches).__name__}; give a list"):
        fxquant.calibrate(nn.Linear(24, 8), batches, scheme="w8a8")
    with pytest.raises(CalibrationError, match=f"batches is a {type(batches).__name__}; give a list"):
        fxquant.rank_errors(nn.Linear(24, 8), batches, scheme="w8a8")


@pytest.mark.parametrize("batch", ["text", 3, None, torch.randn(4, 24).numpy()])
@pytest.mark.parametrize("budget", [None, Budget(cosine=0.9)])
def test_a_batch_of_a_wrong_type_is_named(batch: Any, budget: Budget | None) -> None:
    with pytest.raises(CalibrationError, match=f"a batch is a {type(batch).__name__}; give a tensor"):
        fxquant.calibrate(nn.Linear(24, 8), [torch.randn(4, 24), batch], budget=budget)


def test_a_batch_that_the_model_does_not_take_says_which_one_it_was() -> None:
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError) as raised:
        fxquant.calibrate(nn.Linear(24, 8), [torch.randn(4, 24), torch.randn(4, 7)], scheme="w8a8")
    notes = " ".join(getattr(raised.value, "__notes__", []))
    assert "batch 2 of the calibration data" in notes


def test_a_generator_that_was_read_before_is_named() -> None:
    model, batches = model_and_batches()
    stream = iter(batches)
    fxquant.calibrate(model, stream, scheme="w8a8")
    with pytest.raises(CalibrationError, match=r"no batch to calibrate on; a generator that was read before is empty"):
        fxquant.calibrate(model, stream, scheme="w8a8")
    with pytest.raises(CalibrationError, match="a budget needs at least two batches"):
        fxquant.calibrate(model, stream, budget=Budget(cosine=0.9))


def test_fewer_batches_than_a_checkpoint_has_seen_are_refused(tmp_path: Path) -> None:
    model, batches = model_and_batches()
    file = tmp_path / "seen.safetensors"

    def stopped() -> Iterator[Tensor]:
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxquant.calibrate(model, stopped(), scheme="w6a6", checkpoint=file)
    with pytest.raises(CalibrationError, match="has seen 3 batches, and there are 2"):
        fxquant.calibrate(model, batches[:2], scheme="w6a6", checkpoint=file)


ONE_SCHEME = {"flexq": "w6a6", "fireq": "w4a8"}  # methods that know no other


def model_for(method: str) -> nn.Sequential:
    """The usual model, with a norm where a method needs a stream to rotate."""
    model = model_and_batches()[0]
    return nn.Sequential(model[0], nn.RMSNorm(32), model[2]) if RECIPES[method].vectors is not None else model


@pytest.mark.parametrize("method", list(RECIPES))
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30])
def test_data_that_are_all_equal_leave_a_model_that_runs(method: str, value: float) -> None:
    """A constant has no spread; a static code of it, or none with a reason, must still be near the float model."""
    model, batches = model_for(method), model_and_batches(1)[1]
    x = torch.full((6, 24), value)
    scheme = ONE_SCHEME.get(method, "w8a8")
    calibration = fxquant.calibrate(model, [x, x], scheme=scheme, method=method)
    got = run(model, x, scheme=scheme, calibration=calibration)
    with torch.no_grad():
        wanted = model(x)
    assert torch.isfinite(got).all()
    most = 0.15 if scheme == "w4a8" else 0.05  # weights of 4 bits
    assert (got - wanted).abs().max() <= most * wanted.abs().max() + 1e-3
    assert torch.isfinite(run(model, batches[0], scheme=scheme, calibration=calibration)).all()


@pytest.mark.parametrize("method", list(RECIPES))
def test_batches_without_rows_are_passed_over(method: str) -> None:
    model, batches = model_for(method), model_and_batches(2)[1]
    empty = torch.zeros(0, 24)
    scheme = ONE_SCHEME.get(method, "w6a6")
    found = fxquant.calibrate(model, [batches[0], empty, batches[1]], scheme=scheme, method=method)
    assert dict(found.sites) == dict(fxquant.calibrate(model, batches, scheme=scheme, method=method).sites)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_a_flipped_bit_anywhere_in_a_file_is_refused(part: float, tmp_path: Path) -> None:
    model, batches = model_and_batches(1)
    path = tmp_path / "c.safetensors"
    fxquant.calibrate(model, batches, scheme="w6a6", method="gptq").save(path)
    data = bytearray(path.read_bytes())
    data[int(part * len(data))] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(CalibrationError, match=r"c\.safetensors"):
        Calibration.load(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_checkpoint_is_refused(part: float, cut: bool, tmp_path: Path) -> None:
    model, batches = model_and_batches(3)
    file = tmp_path / "seen.safetensors"

    def stopped() -> Iterator[Tensor]:
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxquant.calibrate(model, stopped(), scheme="w6a6", checkpoint=file)
    data = bytearray(file.read_bytes())
    place = int(part * len(data))
    data[place] ^= 4
    file.write_bytes(bytes(data[:place] if cut else data))
    with pytest.raises(CalibrationError, match=r"seen\.safetensors .*delete it"):
        fxquant.calibrate(model, batches, scheme="w6a6", checkpoint=file)


@pytest.mark.parametrize("features", [100, 128, 300])
@pytest.mark.parametrize("method", [None, "gptq", "mse"])
def test_a_group_that_does_not_divide_the_inputs_has_a_shorter_last_one(features: int, method: str | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(features, 48), torch.randn(9, features)
    scheme = "w4a16-g128"
    calibration = None if method is None else fxquant.calibrate(model, [x], scheme=scheme, method=method)
    got = run(model, x, scheme=scheme, calibration=calibration)
    with torch.no_grad():
        wanted = model(x)
    assert float((got - wanted).square().sum() / wanted.square().sum()) < 0.02
    if calibration is not None:
        codes = next(iter(calibration.sites.values())).codes
        assert codes is not None
        assert codes.scale.shape == (48, -(-features // 128))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "w8a8"}, r"scheme 'w8a8' and a budget.*leave scheme out"),
        ({"method": "gptq"}, r"method 'gptq' and a budget.*leave method out"),
        ({"checkpoint": "seen"}, r"checkpoint 'seen' and a budget.*leave it out"),
    ],
)
def test_what_a_budget_would_not_heed_is_refused(given: dict[str, Any], message: str) -> None:
    model, batches = model_and_batches(2)
    with pytest.raises(ConfigError, match=message):
        fxquant.calibrate(model, batches, budget=Budget(cosine=0.9), **given)


def test_a_weight_that_is_not_finite_is_named_and_not_what_it_spoils() -> None:
    model, batches = model_and_batches()
    model.get_parameter("0.weight").data[1, 2] = float("nan")
    for call in (
        lambda: fxquant.calibrate(model, batches, scheme="w8a8", method="gptq"),
        lambda: fxquant.calibrate(model, batches, budget=Budget(cosine=0.9)),
        lambda: fxquant.rank_errors(model, batches, scheme="w8a8"),
    ):
        with pytest.raises(CalibrationError, match="0:linear: the weight holds 1 values that are not finite"):
            call()


def test_a_ranking_refuses_what_is_not_finite() -> None:
    model, batches = model_and_batches()
    batches[1][7, 5] = float("nan")
    with pytest.raises(CalibrationError) as raised:
        fxquant.rank_errors(model, batches, scheme="w8a8")
    assert str(raised.value) == (
        "0:linear: the calibration data give an input that is not finite (1 of 960 values); leave this batch out, or correct it"
    )


def test_batches_without_rows_alone_name_the_sites() -> None:
    model, empty = model_and_batches()[0], [torch.zeros(0, 24)] * 2
    for call in (
        lambda: fxquant.calibrate(model, empty, scheme="w8a8"),
        lambda: fxquant.calibrate(model, empty, budget=Budget(cosine=0.9)),
        lambda: fxquant.rank_errors(model, empty, scheme="w8a8"),
    ):
        with pytest.raises(
            CalibrationError, match="0:linear: the batch must not be empty; 2:linear: the batch must not be empty"
        ):
            call()


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        ("w4a16-g16", "0:linear: method 'minmax' has nothing to fix where w4a16-g16 leaves activations float; take one"),
        ("nf4", "0:linear: the codes of nf4 follow from what is coded, with no calibration; leave it out"),
        ("float", "the options leave 0:linear, 2:linear float"),
    ],
)
def test_a_scheme_that_leaves_nothing_to_calibrate_says_so(scheme: str, sentence: str) -> None:
    model, batches = model_and_batches()
    with pytest.raises(CalibrationError, match=sentence):
        fxquant.calibrate(model, batches, scheme=scheme)


@pytest.mark.parametrize("part", [0, 0.001, 0.05, 0.5, 0.999])
def test_a_file_that_is_cut_off_says_the_way_out(part: float, tmp_path: Path) -> None:
    model, batches = model_and_batches(1)
    path = tmp_path / "c.safetensors"
    fxquant.calibrate(model, batches, scheme="w6a6", method="gptq").save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(Exception, match=r"c\.safetensors cannot be read: .* Copy it again, or calibrate again"):
        run(model, batches[0], calibration=str(path))


@pytest.mark.parametrize(("scheme", "method"), [("w8a8", "minmax"), ("w4a16-g16", "gptq")])
def test_a_calibration_that_fits_no_linear_is_of_another_model(scheme: str, method: str) -> None:
    model, batches = model_and_batches()
    found = fxquant.calibrate(model, batches, scheme=scheme, method=method)
    other = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 16))
    with pytest.raises(Exception, match=r"another model: '0:linear' has a weight \[32, 24\] in it and \[48, 24\] here"):
        run(other, batches[0], scheme=scheme, calibration=found)
    named = nn.Sequential()
    named.add_module("head", nn.Linear(24, 8))
    with pytest.raises(Exception, match="another model: it knows '0:linear', '2:linear', and this graph has 'head:linear'"):
        run(named, batches[0], scheme=scheme, calibration=found)


@pytest.mark.parametrize(("scheme", "method", "way"), [("w8a8", "minmax", "dynamic"), ("w4a16-g16", "gptq", "to the nearest")])
def test_a_linear_of_another_shape_does_without_and_says_so(scheme: str, method: str, way: str) -> None:
    model, batches = model_and_batches()
    found = fxquant.calibrate(model, batches, scheme=scheme, method=method)
    other = nn.Sequential(model[0], nn.GELU(), nn.Linear(32, 5))
    options: dict[str, Any] = {"codegen": "ops", "scheme": scheme, "calibration": found}
    rows = fxquant.explain(other, batches[0], options=options).sites
    reasons = {row.name: row.reason for row in rows if row.kind == "linear"}
    assert reasons["2:linear"] == f"{way}: the calibration is of a weight of 16×32, this one has 5×32"


def test_a_place_where_no_file_can_be_is_refused_before_any_data(tmp_path: Path) -> None:
    model, batches = model_and_batches()

    def unread() -> Iterator[Tensor]:
        raise AssertionError("a batch was read")
        yield

    for place in (tmp_path, tmp_path / "missing" / "seen.safetensors"):
        with pytest.raises(CalibrationError, match="name a file in a folder that exists"):
            fxquant.calibrate(model, unread(), scheme="w8a8", checkpoint=place)
    found = fxquant.calibrate(model, batches, scheme="w8a8")
    with pytest.raises(CalibrationError, match=r"missing.c\.safetensors cannot be written"):
        found.save(tmp_path / "missing" / "c.safetensors")
    found.save(tmp_path / "c.safetensors")
    assert Calibration.load(tmp_path / "c.safetensors") == found


def test_a_calibration_given_as_checkpoint_is_refused_and_stays(tmp_path: Path) -> None:
    model, batches = model_and_batches()
    file = tmp_path / "c.safetensors"
    found = fxquant.calibrate(model, batches, scheme="w8a8")
    found.save(file)
    with pytest.raises(CalibrationError, match=r"c\.safetensors is no checkpoint of version 1; name another file"):
        fxquant.calibrate(model, batches, scheme="w8a8", checkpoint=file)
    assert Calibration.load(file) == found


@pytest.mark.parametrize("method", ["search", "sequential"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_seen_is_kept_where_coding_stops(
    method: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = model_and_batches()
    file, ran = tmp_path / "seen.safetensors", []

    def stop(*given: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("fxquant.calibration.run._code", stop)
        with pytest.raises(error):
            fxquant.calibrate(model, batches, scheme="w6a6", method=method, checkpoint=file)
    monkeypatch.setattr("fxquant.calibration.observers.InputExtents.observe", lambda *given: ran.append(given))
    found = fxquant.calibrate(model, batches, scheme="w6a6", method=method, checkpoint=file)
    monkeypatch.undo()
    assert not ran
    assert found == fxquant.calibrate(model, batches, scheme="w6a6", method=method)
