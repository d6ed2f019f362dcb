"""Searches by a layer's output: scale grid, alternation, progressive search."""

import pytest
import torch
from torch import Tensor

from fxquant.calibration.observers import Gram, Samples
from fxquant.calibration.searches import (
    Candidates,
    Choice,
    GramMetric,
    Metric,
    Product,
    TensorMetric,
    alternate,
    choose,
    fpcs,
    half_step_start,
    min_max,
    omse,
    scale_grid,
    scan_qparam,
)
from fxquant.calibration.searches.fpcs import Progress, combine_progressively, weight_zero_points
from fxquant.calibration.searches.objectives import OutputObjective, cosine, hessian_weighted, output_mse
from fxquant.calibration.searches.scale_grid import factors, scaled
from fxquant.errors import CalibrationError
from fxquant.formats import Uniform
from fxquant.granularity import Granularity, PerChannel, PerGroup, PerTensor

SYMMETRIC = Uniform(4, is_symmetric=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_product(objective: OutputObjective = output_mse, weight: Granularity | None = None) -> Product:
    x, w = random(60, 16) * torch.linspace(0.1, 3, 16), random(8, 16, seed=1)
    gradient = random(60, 8, seed=2)
    return Product("fc1", x, w, PerTensor(), weight or PerChannel(0), objective, gradient)


def start_of(product: Product) -> tuple[Choice, Choice]:
    sides = (product.left, product.left_granularity), (product.right, product.right_granularity)
    left, right = (min_max(Samples.of("fc1", x, granularity), SYMMETRIC) for x, granularity in sides)
    return left, right


def quantized(product: Product, choices: tuple[Choice, Choice]) -> Tensor:
    left = choices[0].fake_quant(product.left, product.left_granularity)
    return product.multiply(left, choices[1].fake_quant(product.right, product.right_granularity))


def test_the_published_grid_has_a_hundred_factors() -> None:
    grid = factors()
    assert len(grid) == 100
    assert (grid[0], grid[-1]) == pytest.approx((0.01, 0.01 + 99 * 1.19 / 100))


def test_ties_of_the_grid_keep_the_smallest_scale() -> None:
    samples = Samples.of("fc1", torch.zeros(1, 5))
    assert float(scale_grid(TensorMetric(samples), SYMMETRIC, {"scale": torch.ones(1, 1)}).qparams["scale"]) == pytest.approx(
        0.01
    )


@pytest.mark.parametrize("objective", [output_mse, hessian_weighted])
def test_the_output_metric_is_its_formula(objective: OutputObjective) -> None:
    product = linear_product(objective)
    left, right = start_of(product)
    loss = product.metric("right", left).losses(scaled(SYMMETRIC, right.qparams, (1.0, 0.7), "scale"))
    errors = objective(product.left @ product.right.T, quantized(product, (left, right)), product.gradient)
    assert loss.shape == (2, 8)
    assert torch.allclose(loss[0], errors.mean(0), rtol=1e-5)
    whole = product.metric("left", right).losses(scaled(SYMMETRIC, left.qparams, (1.0,), "scale"))
    assert float(whole) == pytest.approx(float(errors.mean()), rel=1e-5)


def test_cosine_judges_whole_tensors_and_refuses_rows_of_a_weight() -> None:
    product = linear_product(cosine)
    left, right = start_of(product)
    loss = product.metric("left", right).losses(scaled(SYMMETRIC, left.qparams, (1.0,), "scale"))
    expected = cosine(product.left @ product.right.T, quantized(product, (left, right))).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(CalibrationError, match=r"^fc1: an objective of whole output rows"):
        product.metric("right", left).losses(scaled(SYMMETRIC, right.qparams, (1.0,), "scale"))


def test_the_output_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    product = linear_product(hessian_weighted)
    start = start_of(product)
    grid = scaled(SYMMETRIC, start[1].qparams, factors(), "scale")
    whole = product.metric("right", start[0]).losses(grid)
    monkeypatch.setattr("fxquant.calibration.searches.product.OUTPUT_CHUNK", 8 * 7)
    assert torch.allclose(product.metric("right", start[0]).losses(grid), whole, rtol=1e-6)


def test_alternating_rounds_lower_the_error_of_the_output() -> None:
    product = linear_product()
    start = start_of(product)

    def search(metric: Metric, choice: Choice) -> Choice:
        return scale_grid(metric, SYMMETRIC, choice.qparams)

    losses = [float(output_mse(product.left @ product.right.T, quantized(product, start)).mean())]
    for rounds in (1, 3):
        found = alternate(product, start, lambda m: search(m, start[0]), lambda m: search(m, start[1]), rounds=rounds)
        losses.append(float(output_mse(product.left @ product.right.T, quantized(product, found)).mean()))
        assert float(found[0].loss) == pytest.approx(losses[-1], rel=1e-5)
    assert losses[2] <= losses[1] < losses[0]


def test_heads_of_a_matrix_product_are_searched_one_by_one() -> None:
    q, k = random(2, 3, 5, 8) * torch.tensor([1.0, 5.0, 0.2])[:, None, None], random(2, 3, 8, 5, seed=1)
    product = Product("qk", q, k, PerChannel(1), PerChannel(1))
    start = start_of(product)
    found = scale_grid(product.metric("left", start[1]), SYMMETRIC, start[0].qparams)
    for head in range(3):
        one = slice(head, head + 1)
        alone = Product("qk", q[:, one], k[:, one], PerChannel(1), PerChannel(1))
        other = Choice(SYMMETRIC, {"scale": start[1].qparams["scale"][one]}, start[1].loss[one])
        single = scale_grid(alone.metric("left", other), SYMMETRIC, {"scale": start[0].qparams["scale"][one]})
        assert torch.equal(single.qparams["scale"], found.qparams["scale"][one])
        assert torch.allclose(single.loss, found.loss[one], rtol=1e-6)


def test_the_gram_metric_is_the_output_metric_with_exact_inputs() -> None:
    product = linear_product()
    gram = Gram("fc1", dtype=torch.float64)
    gram.observe(product.left)
    start = half_step_start(Samples.of("fc1", product.right, PerChannel(0)), SYMMETRIC)
    grid = scaled(SYMMETRIC, start, factors(), "scale")
    by_gram = GramMetric("fc1", product.right, gram.gram, gram.rows)
    assert torch.allclose(by_gram.losses(grid), product.metric("right").losses(grid), rtol=1e-4)
    found = scale_grid(by_gram, SYMMETRIC, start)
    tensor = scale_grid(TensorMetric(Samples.of("fc1", product.right, PerChannel(0))), SYMMETRIC, start)
    again = by_gram.losses(Candidates(SYMMETRIC, {"scale": tensor.qparams["scale"][None]}))[0]
    assert bool((found.loss <= again).all())


def test_blocks_without_an_output_of_their_own_are_refused() -> None:
    product = linear_product(weight=PerGroup(4))
    with pytest.raises(CalibrationError, match=r"^fc1: blocks of per group of 4 have no part of the output"):
        product.metric("right").losses(Candidates(SYMMETRIC, {"scale": torch.ones(1, 32, 1)}))


def test_operands_that_are_no_product_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"^fc1: a product is of two or of four axes"):
        Product("fc1", random(2, 3, 4), random(5, 4), PerTensor(), PerTensor())
    with pytest.raises(CalibrationError, match=r"^fc1: an operand has values that are not finite"):
        Product("fc1", torch.full((2, 3), torch.nan), random(5, 3), PerTensor(), PerTensor())


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.zeros(2, 5), "zero everywhere or not finite; take it of a loss with labels"),
        (torch.full((2, 5), torch.inf), "zero everywhere or not finite"),
        (torch.ones(2, 3), r"of shape \(2, 3\), the output \(2, 5\)"),
    ],
)
def test_gradients_that_weigh_nothing_are_refused(gradient: Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=f"^fc1: the gradient is {message}"):
        Product("fc1", random(2, 3), random(5, 3), PerTensor(), PerTensor(), hessian_weighted, gradient)


def test_formats_that_a_search_cannot_serve_are_refused() -> None:
    samples = Samples.of("fc1", random(100))
    metric = TensorMetric(samples)
    with pytest.raises(CalibrationError, match=r"^fc1: the scales of affine4-pow2 are powers of two"):
        fpcs(metric, samples, Uniform(4, power_of_two=True))
    with pytest.raises(CalibrationError, match=r"^fc1: the scales of symmetric4-pow2 are powers of two"):
        scale_grid(metric, Uniform(4, True, True), {"scale": torch.ones(1, 1)})
    with pytest.raises(CalibrationError, match=r"^fc1: symmetric4 has no zero point to search"):
        fpcs(metric, samples, SYMMETRIC)
    with pytest.raises(CalibrationError, match=r"^fc1: affine4 is not symmetric"):
        half_step_start(samples, Uniform(4))


def test_ranges_are_searched_by_the_output_too() -> None:
    product = linear_product()
    samples = Samples.of("fc1", product.right, PerChannel(0))
    metric = product.metric("right")
    by_output, by_tensor = omse(samples, SYMMETRIC, metric=metric), omse(samples, SYMMETRIC)
    losses = metric.losses(Candidates(SYMMETRIC, {"scale": by_tensor.qparams["scale"][None]}))[0]
    assert bool((by_output.loss <= losses).all())
    assert bool((by_output.loss < losses).any())


class Counting:
    """A metric that counts evaluations; the best scale is 0.3, the best zero point 7."""

    site = "fc1"

    def __init__(self) -> None:
        self.evaluations: list[int] = []

    def losses(self, candidates: Candidates) -> Tensor:
        self.evaluations.append(len(candidates))
        scale, zero_point = candidates.qparams["scale"][..., 0], candidates.qparams["zero_point"][..., 0]
        return (scale.double() - 0.3).abs() + (zero_point.double() - 7).abs()


@pytest.mark.parametrize(("bits", "zero_points"), [(3, 8), (4, 16), (6, 16)])
def test_the_progressive_search_has_the_published_cost(bits: int, zero_points: int) -> None:
    metric = Counting()
    fpcs(metric, Samples.of("fc1", random(1000)), Uniform(bits))
    assert metric.evaluations == [128] * 6
    assert min(16, 2**bits) == zero_points
    assert weight_zero_points(Uniform(bits)) == min(16, 2**bits // 2)


def test_zero_points_are_whole_numbers_around_the_middle() -> None:
    seen: list[Tensor] = []

    class Recording(Counting):
        def losses(self, candidates: Candidates) -> Tensor:
            seen.append(candidates.qparams["zero_point"].unique())
            return super().losses(candidates)

    fpcs(Recording(), Samples.of("fc1", random(1000)), Uniform(6))
    assert seen[0].tolist() == list(range(24, 40))
    fpcs(Recording(), Samples.of("fc1", random(1000)), Uniform(4), zero_points=weight_zero_points(Uniform(4)))
    assert seen[-1].tolist() == [7]


def test_the_progressive_search_closes_in_on_the_best_scale() -> None:
    metric = Counting()
    start = torch.linspace(0.1, 1.0, 8)[:, None, None]
    grid = Candidates(Uniform(4), {"scale": start, "zero_point": torch.full_like(start, 7)})
    coarse, fine = choose(metric, [grid]), combine_progressively(metric, grid, start[1] - start[0])
    assert float(fine.loss) < 1e-4 < float(coarse.loss)


def test_the_best_candidate_is_never_lost() -> None:
    metric = Counting()
    start = torch.tensor([0.3, 0.9])[:, None, None]
    grid = Candidates(Uniform(4), {"scale": start, "zero_point": torch.full_like(start, 7)})
    found = combine_progressively(metric, grid, torch.tensor([[0.6]]), Progress(refinements=2))
    assert float(found.qparams["scale"]) == pytest.approx(0.3)


def test_the_progressive_search_is_about_as_good_as_omse_and_deterministic() -> None:
    samples = Samples.of("fc1", random(3, 4000), PerChannel(0))
    first, second = (fpcs(TensorMetric(samples), samples, Uniform(4)) for _ in range(2))
    assert bool((first.loss <= 1.02 * omse(samples, Uniform(4)).loss).all())
    assert all(torch.equal(value, second.qparams[name]) for name, value in first.qparams.items())
    for block in range(3):
        row = Samples.of("fc1", samples.values[block])
        alone = fpcs(TensorMetric(row), row, Uniform(4))
        assert float(alone.qparams["scale"]) == float(first.qparams["scale"][block])


def test_a_tensor_of_one_value_has_a_finite_answer() -> None:
    samples = Samples.of("fc1", torch.zeros(1, 10))
    assert float(fpcs(TensorMetric(samples), samples, Uniform(4)).loss) == 0


def test_a_scan_takes_the_best_value_of_one_qparam_per_block() -> None:
    samples = Samples.of("fc1", torch.tensor([[0.0, 1, 2, 3], [-3.0, -2, -1, 0]]), PerChannel(0))
    start = {"scale": torch.ones(2, 1), "zero_point": torch.zeros(2, 1)}
    found = scan_qparam(TensorMetric(samples), Uniform(2), start, "zero_point", (0, 1, 2, 3))
    assert found.qparams["zero_point"].tolist() == [[0], [3]]
    assert found.loss.tolist() == [0, 0]
