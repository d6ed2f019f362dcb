"""What the shared rule test cannot see of reparameterizations: worked numbers, whole models, groups, refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.errors import RuleError
from fxquant.passes.joint import NONLINEAR, PARTNER, RESIDUAL
from fxquant.passes.match import READ_ELSEWHERE
from fxquant.passes.reparam import NO_NORM, OTHER, Vectors, rotation
from fxquant.passes.reparam.input_shift import GELU_SHIFT
from fxquant.passes.reparam.legality import FULL, POSITIVE, UNTIED
from fxquant.passes.reparam.spectral_norm import CONSTANT
from fxquant.passes.reparam.stream import AFFINE, COSTLY, READER
from fxquant.passes.reweight import DISAGREE
from fxquant.testing.graphs import Captured, capture_call

TOLERANCE = 2e-5
X = torch.linspace(-2, 3, 2 * 5 * 8).reshape(2, 5, 8).sin()


class Block(nn.Module):
    """A pre-norm block: q, k and v read one norm, LayerScale on both branches."""

    def __init__(self, width: int = 8, heads: int = 2, post: bool = False) -> None:
        super().__init__()
        self.heads, self.post = heads, post
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale1, self.scale2 = (nn.Parameter(torch.rand(width) + 0.5) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)

    def attention(self, x: Tensor) -> Tensor:
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (layer(x).view(*split[:3], x.shape[-1] // self.heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))  # type: ignore[no-any-return]
        x = x + self.scale1 * self.attention(self.norm1(x))
        branch: Tensor = self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + branch


class Stack(nn.Module):
    """A small vision transformer: an input linear, positions, two blocks, a last norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def of(rule: str, site: str, **vectors: Tensor) -> Vectors:
    return {rule: {site: vectors}}


def parameter(values: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float32))


def linear_of(weight: Any, bias: Any = None) -> nn.Linear:
    """A linear with these values."""
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(bias)
    return layer


def norm_linear(**kwargs: Any) -> nn.Sequential:
    model = nn.Sequential(nn.LayerNorm(8, **kwargs), nn.Linear(8, 6))
    for p in model.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return model


def close(a: Tensor, b: Any, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a.to(torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=0, atol=tolerance)


def test_all_folds_of_a_vision_transformer() -> None:
    made = capture_call(Stack(), X)
    found = made.change(names=("layer_scale", "attention_scale", "norm_affine"))
    assert found["layer_scale"] == [None] * 4
    assert found["attention_scale"] == [None] * 2
    assert found["norm_affine"] == [None] * 9, "q, k, v and fc1 of each block; the head reads one token of the last norm"
    assert made.error() < TOLERANCE
    norms = [made.node("layer_norm", index) for index in range(made.count("layer_norm"))]
    assert [node.args[2] for node in norms] == [None] * 5
    products = [node for node in made.gm.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert all(node.meta["fxquant_frozen"] for node in products), "only weights are multiplied"
    assert made.sites.keys() >= {"blocks.0.fc2:linear", "blocks.1.o:linear", "blocks.0.norm1:layer_norm"}


def test_the_stream_of_a_vision_transformer_is_rotated() -> None:
    made = capture_call(Stack(), X)
    turn = torch.linalg.qr(torch.randn(8, 8))[0]
    given = of("rotation", "head:linear", rotation=turn)
    assert made.change(given, names=["layer_scale"])["rotation"] == [AFFINE + COSTLY]
    made = capture_call(Stack(), X)
    found = made.change(of("rotation", "blocks.0.fc2:linear", rotation=turn), names=("layer_scale", "norm_affine"))
    assert found["rotation"] == [None]
    assert made.count("layer_norm") == 0, "means are taken off by those who write the stream"
    assert made.count("rms_norm") == 5
    assert made.error() < 1e-4


def test_a_post_norm_block_is_left() -> None:
    made = capture_call(Block(post=True), X)
    factor = torch.ones(8)
    sites = {f"{name}:linear": {"factor": factor} for name in ("q", "fc1")}
    assert sorted(made.change({"smooth": sites}, names=["norm_affine"])["smooth"], key=str) == sorted([OTHER, RESIDUAL])
    given = of("rotation", "fc1:linear", rotation=torch.eye(8))
    assert capture_call(Block(post=True), X).change(given)["rotation"] == [READER.format("add") + COSTLY]


def test_all_readers_of_a_norm_take_up_a_factor() -> None:
    made = capture_call(Block(), X)
    before = set(made.sites)
    factor = torch.rand(8) + 0.5
    given = of("smooth", "norm1:layer_norm", factor=factor)
    assert made.change(given) == {"smooth": [None, None, None]}
    assert made.error() < TOLERANCE
    assert set(made.sites) == before, "nodes keep their places and names"
    assert len(made.inputs) == len(made.args) + 1
    assert made.change() == {}, "a vector serves once"


def test_readers_that_hand_over_one_tensor_share_it_and_others_are_refused() -> None:
    factor = torch.rand(8) + 0.5
    made = capture_call(Block(), X)
    same = {"smooth": {f"{name}:linear": {"factor": factor} for name in "qkv"}}
    assert made.change(same) == {"smooth": [None, None, None]}
    assert made.error() < TOLERANCE
    made = capture_call(Block(), X)
    different = {"smooth": {f"{name}:linear": {"factor": factor + i} for i, name in enumerate("qkv")}}
    assert made.change(different) == {"smooth": [DISAGREE] * 3}
    assert made.error() < TOLERANCE


@pytest.mark.parametrize("kind", ["residual", "nonlinear", "reader", "tied", "shared norm", "half", "factor"])
def test_refusals(kind: str) -> None:
    norm, layer = norm_linear()
    factor = torch.rand(8) + 0.5
    wanted = {
        "residual": RESIDUAL,
        "nonlinear": NONLINEAR,
        "reader": READ_ELSEWHERE,
        "tied": UNTIED,
        "shared norm": UNTIED,
        "half": FULL,
        "factor": POSITIVE,
    }[kind]
    made = _refused(kind, norm, layer, X, factor)
    events = made[1].get("smooth", [])
    assert wanted in [event.removeprefix(PARTNER) for event in events if event is not None], made[1]
    assert made[0].error() < 1e-2


def _refused(kind: str, norm: Any, layer: Any, x: Tensor, factor: Tensor) -> tuple[Captured, dict[str, list[str | None]]]:
    def forward(x: Tensor) -> Any:
        y = norm(x)
        if kind == "residual":
            return layer(y)[..., :1] + y
        if kind == "nonlinear":
            return layer(y)[..., :1] * F.gelu(y)
        if kind == "reader":
            return layer(y), y
        if kind == "tied":
            return layer(y) + F.linear(x, layer.weight)
        return layer(y)[..., :1] + norm(2 * x).exp() if kind == "shared norm" else layer(y)

    if kind == "half":
        norm, layer, x = norm.to(torch.bfloat16), layer.to(torch.bfloat16), x.to(torch.bfloat16)
    made = capture_call(forward, x)
    if isinstance(made.wanted, tuple):
        made.wanted = made.wanted[0]
    site = next(name for name in made.sites if name.endswith(":linear"))
    value = factor * 0 if kind == "factor" else factor.to(x.dtype)
    return made, made.change(of("smooth", site, factor=value))


def test_a_site_without_a_norm_says_what_stands_there() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.gelu(self.norm(x))) + self.first(x + self.norm(x))  # type: ignore[no-any-return]

    made = capture_call(Model(), X)
    sites = {"first:linear": {"factor": torch.ones(8)}, "second:linear": {"factor": torch.ones(8)}}
    assert sorted(made.change({"smooth": sites})["smooth"], key=str) == sorted([NO_NORM, NONLINEAR])
    assert len(made.inputs) == len(made.args), "inputs that nothing reads are gone"


def test_a_norm_without_gain_gets_one_and_a_linear_without_bias_too() -> None:
    model = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 6, bias=False))
    made = capture_call(model, X)
    given = {
        "scale": torch.rand(8) + 0.5,
        "zero_point": vector(*range(8)),
        "tensor_scale": vector(0.7),
        "tensor_zero_point": vector(4),
    }
    assert made.change(of("one_scale", "1:linear", **given)) == {"one_scale": [None]}
    assert made.error() < TOLERANCE
    assert made.node("linear").args[2] is not None


def test_unknown_rules_and_wrong_vectors_are_errors() -> None:
    made = capture_call(norm_linear(), X)
    with pytest.raises(RuleError, match="no reparameterization is called \\['smoth'\\]"):
        made.change(names=["smoth"])
    with pytest.raises(RuleError, match="smooth takes the vectors"):
        made.change(of("smooth", "1:linear", scale=torch.ones(8)))
    assert made.change(of("smooth", "another.graph:linear", factor=torch.ones(8))) == {}


def test_exponents_change_no_bit() -> None:
    """LLM-FP4: channel maxima .2, .9, 6, 48 give exponents 3, 3, 3, 0."""
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5))
    made = capture_call(model, X[..., :4])
    assert made.change(of("exponent_shift", "1:linear", exponent=vector(3, 3, 3, 0))) == {"exponent_shift": [None]}
    assert torch.equal(made.run(), made.wanted)
    assert close(made.value(made.node("layer_norm").args[2]), [8, 8, 8, 1], 0)


def test_smooth_worked_example() -> None:
    """SmoothQuant with α = .5 moves the outlier of channel 1 into the weight; the product stays."""
    weight = torch.tensor([[1, -2, 0.5], [1, 0.5, -1], [2, -1, 0], [-4, 1, 2]]).t()
    model = nn.Sequential(nn.RMSNorm(4, eps=1e-6), linear_of(weight.tolist()))
    made = capture_call(model, torch.tensor([[1, -16, 2, 0.5], [-4, 9, -1, -1]]))
    factor = vector(math.sqrt(2), 4, 1, 0.5)
    assert made.change(of("smooth", "0:rms_norm", factor=factor)) == {"smooth": [None]}
    assert made.error() < TOLERANCE
    assert close(made.value(made.node("linear").args[1]), weight * factor)


def test_repbn_worked_example() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.alpha = nn.BatchNorm1d(2, eps=0.0), parameter([0.5])
            self.fc = linear_of([[1, 2], [-1, 0.5], [0, 3]], [0, 1, -1])
            self.bn.weight, self.bn.bias = parameter([2, 1]), parameter([0.1, -0.2])
            assert self.bn.running_mean is not None
            assert self.bn.running_var is not None
            self.bn.running_mean.copy_(vector(0.5, -1))
            self.bn.running_var.copy_(vector(4, 0.25))

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(1, 2)
            x = self.bn(x) + self.alpha * x
            return self.fc(x.transpose(1, 2))  # type: ignore[no-any-return]

    x = torch.tensor([[[1.0, -2], [3, 0]]])
    made = capture_call(Model().eval(), x)
    assert made.change(names=["rep_batch_norm"]) == {"rep_batch_norm": [None]}
    layer = made.node("linear")
    assert close(made.value(layer.args[1]), [[1.5, 5], [-1.5, 1.25], [0, 7.5]])
    assert close(made.value(layer.args[2]), [3.2, 2.3, 4.4])
    assert made.error() < TOLERANCE
    assert made.count("batch_norm") == 0
    assert close(made.wanted, F.linear(torch.tensor([[[1.1, -3.2], [4.1, 1.8]]]), *Model().fc.parameters()))


@pytest.mark.parametrize(("steps", "sigma"), [(0, 6.403124), (1, 6.704119), (2, 6.708153), (3, 6.708203), (40, math.sqrt(45))])
def test_spectral_norm_is_a_constant_of_the_graph(steps: int, sigma: float) -> None:
    """sigmaReparam: W = [[3, 0], [4, 5]], γ = 2; one power step from the buffer, which has gone some from [1, 0]."""

    class Model(nn.Module):
        u: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gamma = parameter([[3, 0], [4, 5]]), parameter([2])
            u = vector(1, 0)
            for _ in range(steps):
                u = F.normalize(self.weight.detach().T @ (self.weight.detach() @ u), dim=0)
            self.register_buffer("u", u)

        def forward(self, x: Tensor) -> Tensor:
            v = F.normalize(torch.mv(self.weight, self.u), dim=0)
            u = F.normalize(torch.mv(self.weight.T, v), dim=0)
            sigma = torch.einsum("d,dc,c->", v, self.weight, u)
            return F.linear(x, self.gamma / sigma * self.weight)

    made = capture_call(Model(), X[..., :2])
    assert made.change(names=["spectral_norm"]) == {"spectral_norm": [CONSTANT]}
    weight = made.value(made.node("linear").args[1])
    assert close(weight, torch.tensor([[3.0, 0], [4, 5]]) * 2 / sigma)
    assert steps < 40 or close(weight, [[0.894427, 0], [1.192570, 1.490712]])


@pytest.mark.parametrize(("layer", "scale"), [(1, 1.0), (4, 0.5), (9, 1 / 3), (16, 0.25)])
def test_norm_scaling(layer: int, scale: float) -> None:
    norm = nn.LayerNorm(8)
    made = capture_call(lambda x: norm(x) * (1 / math.sqrt(layer)) if layer > 1 else norm(x) * 1.0 + 0.0, X)
    assert made.change(names=["norm_scale"]) == {"norm_scale": [None]}
    assert close(made.value(made.node("layer_norm").args[2]), [scale] * 8)
    assert made.error() < TOLERANCE


def test_adalog_shift_worked_example() -> None:
    """The bias takes off what makes GELU's output positive."""
    coded = torch.tensor([-0.169971, -0.098096, -0.019971, -0.019971, 0.042529, 0.505029, 1.930029, 2.830029])
    layer = nn.Linear(8, 3)
    made = capture_call(lambda x: layer(x - GELU_SHIFT), (coded + GELU_SHIFT).expand(2, 8))
    assert made.change(names=["input_shift"]) == {"input_shift": [None]}
    assert made.error() < TOLERANCE
    assert close(made.value(made.node("linear").args[2]), layer.bias - GELU_SHIFT * layer.weight.sum(1))


def test_half_octaves_worked_example() -> None:
    """RepQ-ViT: codes [2, 3, 7, 8, 11, 11] of an attention row; two sums of shifts."""
    a, v = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.02, 0.02]]), torch.tensor([[12.0], [-7], [100], [-33], [5], [64]])
    made = capture_call(lambda a, v: torch.exp2(torch.round(-2 * torch.log2(a)).clamp(0, 15) * -0.5) @ v, a, v)
    assert made.change(names=["half_octaves"]) == {"half_octaves": [None]}
    assert close(made.run(), [[11.82616002761242]])
    assert made.count("matmul") == 2


def test_hadamard_worked_example() -> None:
    h = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert rotation.is_orthogonal(h)
    assert close(rotation.columns(vector(8, 0.1, -0.2, 0.1), h), [4.0, 3.8, 4.1, 4.1])


def test_low_rank_loses_the_discarded_eigenvalues() -> None:
    torch.manual_seed(3)
    layer, x = nn.Linear(40, 32), torch.randn(200, 40) * torch.linspace(0.1, 3, 40)
    y = layer(x).detach()
    mean = y.mean(0)
    values, directions = torch.linalg.eigh((y - mean).t() @ (y - mean) / len(y))
    made = capture_call(layer, x)
    given = of("low_rank", ":linear", basis=directions[:, -12:].contiguous(), mean=mean)
    assert made.change(given) == {"low_rank": [None]}
    lost = (made.run() - y).square().sum(1).mean()
    assert torch.allclose(lost, values[:-12].sum(), rtol=1e-4)
    assert made.count("linear") == 2
