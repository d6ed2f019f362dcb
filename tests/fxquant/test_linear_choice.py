"""What runs a linear under ``auto``, by tables made here: the scheme, our float kernel or F.linear."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fxquant
from fxquant.lowering import timings
from fxquant.lowering.isa import current_isa
from fxquant.lowering.timings import Table
from fxquant.reporting.record import SiteRow
from fxquant.schemes import choose_scheme

SCHEME = str(choose_scheme(current_isa()))
EPS = torch.finfo(torch.float32).eps
Promise = Callable[..., None]
pytestmark = pytest.mark.skipif(SCHEME == "None", reason="auto has no scheme for scalar code")


class Net(nn.Module):
    """Two linears with a ReLU between them."""

    def __init__(self, width: int = 64, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


@pytest.fixture
def promise(monkeypatch: pytest.MonkeyPatch) -> Promise:
    """``promise(float us, own float us, scheme us)`` puts a table in force that says so at every point of its grid."""

    def install(float_us: float, own_us: float | None, scheme_us: float, more_threads: int = 0) -> None:
        us = {"float": float_us, SCHEME: scheme_us} | ({} if own_us is None else {"linear_float": own_us})
        cubes = {name: [[[value] * 3] * 3] * 2 for name, value in us.items()}
        grid = ((1, 16), (8, 64, 512), (8, 64, 512))
        table = Table("a CPU", torch.get_num_threads() + more_threads, *grid, cubes)
        monkeypatch.setattr(timings, "load_table", lambda isa: table)

    return install


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="fxquant", options={"codegen": "ops", **options})


@torch.no_grad()
def coarse(model: Net) -> Net:
    """A channel whose largest weight leaves nothing of 2047 others at 8 bits."""
    model.first.weight[0] = 0.49
    model.first.weight[0, 0] = 127
    return model


@torch.no_grad()
def rows_of(model: nn.Module, x: Tensor, **options: Any) -> tuple[SiteRow, ...]:
    """The rows of the linears after a call whose result is right."""
    fast, wanted = compiled(model, **options), model(x)
    assert (fast(x) - wanted).abs().max() <= 0.1 * wanted.abs().max()
    return tuple(row for row in fxquant.report(fast).sites if row.kind == "linear")


@pytest.mark.parametrize(
    ("us", "kernel"),
    [
        ((100, 50, 80), "linear_float"),
        ((100, 50, 49), "linear_float"),  # the scheme must beat the float kernel by more than noise
        ((100, 50, 40), "linear_dynamic"),
        ((100, 99, 80), "linear_dynamic"),
        ((100, 98, 97), None),  # and the float kernel F.linear
        ((100, None, 97), None),  # a table of an older release
        ((100, None, 80), "linear_dynamic"),
    ],
    ids=str,
)
def test_the_fastest_runs(promise: Promise, us: tuple[float, float, float], kernel: str | None) -> None:
    promise(*us)
    for row in rows_of(Net(), torch.randn(16, 64)):
        assert row.kernel == kernel
        assert row.scheme == (SCHEME if kernel == "linear_dynamic" else None)
        assert (row.float_us, row.own_float_us, row.scheme_us) == tuple(u and pytest.approx(u) for u in us)


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_float_kernel_keeps_to_its_tolerance(promise: Promise, codegen: str, bias: bool) -> None:
    promise(100, 50, 80)
    layer, x = nn.Linear(64, 33, bias=bias), torch.randn(2, 8, 64)
    fast = compiled(layer, codegen=codegen)
    wide = None if layer.bias is None else layer.bias.double()
    exact = linear(x.double(), layer.weight.double(), wide)
    bound = linear(x.double().abs(), layer.weight.double().abs(), None if wide is None else wide.abs()) * (64 + 2) * EPS / 2
    assert ((fast(x) - exact).abs() <= bound).all()
    (row,) = fxquant.report(fast).sites
    assert (row.kernel, row.error_class) == ("linear_float", "REAL")
    assert row.reason is not None
    assert "within (K + 2) · 2⁻²⁴ of Σ|x·w| + |b|" in row.reason
    assert row.bytes_after == fxquant.ops.packed_float_bytes(33, 64)


def test_the_sentence_says_why_there_is_no_scheme(promise: Promise) -> None:
    promise(100, 50, 80)
    row = rows_of(Net(), torch.randn(16, 64))[0]
    assert row.reason is not None
    assert row.reason.startswith(
        f"auto: float is as fast: 100 us (50 us in our kernel), and 80 us as {SCHEME}, by the measured"
    )


def test_a_weight_that_rounds_badly_stays_float_in_our_kernel(promise: Promise) -> None:
    promise(100, 50, 20)
    first, second = rows_of(coarse(Net(2048)), torch.randn(16, 2048))
    assert (first.kernel, first.scheme, second.scheme) == ("linear_float", None, SCHEME)
    assert "rounding the weight costs too much" in str(first.reason)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("the option", {"float_kernels": "off"}),
        ("the setting", {"scheme": "float"}),
        ("the site", {"sites": {"*": "float"}}),
        ("half precision", {}),
        ("few columns", {}),
        ("a huge weight", {}),
        ("other threads", {}),
    ],
)
def test_where_f_linear_stays(promise: Promise, change: str, options: dict[str, Any]) -> None:
    promise(100, 50, 96, more_threads=change == "other threads")
    width, hidden = {"few columns": (15, 15), "a huge weight": (2048, 2064)}.get(change, (64, 64))
    model, x = Net(width, hidden), torch.randn(16, width)
    if change == "half precision":
        model, x = model.bfloat16(), x.bfloat16()
    for row in rows_of(model, x, **options):
        assert (row.kernel, row.scheme) == (None, None)
        assert row.reason
        assert row.float_us is not None  # what F.linear takes is told all the same


def test_a_scheme_that_the_user_chose_is_not_overruled(promise: Promise) -> None:
    promise(100, 50, 300)
    first, second = rows_of(Net(), torch.randn(16, 64), sites={"first": SCHEME})
    assert first.scheme == SCHEME
    assert first.scheme_us == pytest.approx(300)
    assert second.kernel == "linear_float"


@torch.no_grad()
def test_nothing_is_taken_where_nothing_gains(promise: Promise) -> None:
    """A small model is compiled as it came: operators of ours would cost it more than F.linear does."""
    promise(3, 9, 12)
    model, x = Net(), torch.randn(1, 64)
    fast = compiled(model, codegen="inductor")
    assert torch.equal(fast(x), torch.compile(model)(x))
    report = fxquant.report(fast)
    assert report.graphs[0].notes == ("nothing was quantized: the graph is compiled as it came",)
    assert all(row.kernel is None and row.bytes_after == 0 for row in report.sites)


@torch.no_grad()
@pytest.mark.parametrize(
    ("us", "is_taken"), [((3, 2.5, 12), False), ((3, 9, 2.5), False), ((30, 20, 40), True), ((30, 40, 20), True)]
)
def test_a_graph_must_gain_more_than_its_weights_cost_a_call(promise: Promise, us: tuple[float, ...], is_taken: bool) -> None:
    promise(*us)
    for row in rows_of(Net(), torch.randn(1, 64)):
        assert (row.kernel is not None) == is_taken
        assert ("looking after its packed weights" in str(row.reason)) != is_taken


@torch.no_grad()
@pytest.mark.parametrize("codegen", ["ops", "inductor"])
def test_a_changed_weight_is_packed_again(promise: Promise, codegen: str) -> None:
    promise(100, 50, 80)
    model, x = Net(), torch.randn(16, 64)
    fast = compiled(model, codegen=codegen)
    torch.testing.assert_close(fast(x), model(x))
    model.first.weight.mul_(3)
    torch.testing.assert_close(fast(x), model(x))
    model.load_state_dict(Net().state_dict(), assign=True)
    torch.testing.assert_close(fast(x), model(x))
    model.second.weight = nn.Parameter(torch.randn(64, 64))
    torch.testing.assert_close(fast(x), model(x))
    model.second.weight[3, 5] = float("nan")
    torch.testing.assert_close(fast(x), model(x), equal_nan=True)


@torch.no_grad()
def test_sites_on_one_weight_share_its_panels(promise: Promise) -> None:
    promise(100, 50, 80)
    model = Net()
    model.second.weight = model.first.weight
    first, second = rows_of(model, torch.randn(16, 64))
    assert (first.kernel, second.kernel) == ("linear_float", "linear_float")
    assert (first.bytes_after, second.bytes_after) == (fxquant.ops.packed_float_bytes(64, 64), 0)


@torch.no_grad()
def test_a_tied_weight_keeps_the_setting_of_each_site(promise: Promise) -> None:
    promise(100, 50, 20)
    weight = coarse(Net(2048)).first.weight
    fast = compiled(lambda x: (linear(x, weight), linear(-x, weight)), sites={":linear#2": SCHEME})
    fast(torch.randn(16, 2048))
    first, second = fxquant.report(fast).sites
    assert (first.kernel, second.scheme) == ("linear_float", SCHEME)


@torch.no_grad()
def test_any_number_of_rows(promise: Promise) -> None:
    promise(100, 50, 80)
    layer = nn.Linear(64, 48)
    fast = compiled(layer, codegen="inductor")
    for count in (16, 5, 1, 37, 0):
        x = torch.randn(count, 64)
        torch.testing.assert_close(fast(x), layer(x))


def test_explain_tells_all_three_times_and_packs_nothing(promise: Promise) -> None:
    promise(100, 50, 80)
    report = fxquant.explain(Net(), torch.randn(16, 64), options={"sites": {"second": SCHEME}})
    first, second = (row for row in report.sites if row.kind == "linear")
    assert (first.kernel, second.scheme) == ("linear_float", SCHEME)
    sites = [site for site in json.loads(report.to_json())["graphs"][0]["sites"] if site["kind"] == "linear"]
    for site in sites:
        assert [round(site[field]) for field in ("float_us", "own_float_us", "scheme_us")] == [100, 50, 80]
    lines = str(report).splitlines()
    header = next(line for line in lines if "float us" in line)
    assert "own float us" in " ".join(header.split())
    assert all(word in next(line for line in lines if "first:linear" in line) for word in ("100", "50", "80"))


def test_without_a_table_there_are_no_times_and_small_weights_stay_float() -> None:
    report = fxquant.explain(Net(), torch.randn(16, 64))
    assert "float us" not in str(report)
    assert [row.reason for row in report.sites if row.kind == "linear"] == [
        "auto: 4096 weights are too few to win over float (fewer than 32768)"
    ] * 2


class Gated(nn.Module):
    """A feed-forward block as language models have it, and a linear behind a norm."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(256, 512), nn.Linear(256, 512), nn.Linear(512, 256)
        self.gain, self.product = nn.Parameter(torch.rand(256)), product

    def forward(self, x: Tensor) -> Tensor:
        x = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        y: Tensor = self.down(self.product(self.gate(x), self.up(x)))
        return y


PRODUCTS = [
    lambda gate, up: nn.functional.silu(gate) * up,
    lambda gate, up: nn.functional.gelu(gate, approximate="tanh") * up,
    lambda gate, up: nn.functional.glu(torch.cat([up, gate], -1)),
    lambda gate, up: (gate * torch.sigmoid(gate) * up).view(-1, 512).double().float(),
]


@pytest.mark.parametrize("product", PRODUCTS)
def test_auto_gives_a_gated_product_8_bits(product: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_ISA", "avx2")
    rows = {row.name.split(":")[0]: row for row in fxquant.explain(Gated(product), torch.randn(64, 256)).sites}
    assert [str(rows[name].scheme) for name in ("gate", "up", "down")] == ["w8a7", "w8a7", "w8a8"]
    assert rows["gate"].reason is None
    assert rows["down"].reason == "8-bit activations: its input is a product of two activations, which tends to have outliers"


def test_an_explicit_scheme_of_a_gated_product_stays_and_is_warned_about() -> None:
    report = fxquant.explain(Gated(PRODUCTS[0]), torch.randn(64, 256), options={"scheme": "w8a7"})
    rows = {row.name.split(":")[0]: row for row in report.sites}
    assert [str(rows[name].scheme) for name in ("gate", "down")] == ["w8a7", "w8a7"]
    assert rows["gate"].reason is None
    assert "8 bits keep more of it" in str(rows["down"].reason)


def test_a_calibration_knows_the_scheme_of_a_gated_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_ISA", "avx2")
    model, x = Gated(PRODUCTS[0]), torch.randn(64, 256)
    calibration = fxquant.calibrate(model, [x])
    assert [calibration.sites[f"{name}:linear"].scheme for name in ("gate", "down")] == ["w8a7", "w8a8"]
    rows = {row.name.split(":")[0]: row for row in fxquant.explain(model, x, options={"calibration": calibration}).sites}
    assert [str(rows[name].scheme).removesuffix(" static") for name in ("gate", "down")] == ["w8a7", "w8a8"]
