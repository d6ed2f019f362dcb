"""LLM-FP4: grids, worked examples, pre-shifted exponent biases, candidates of the searches."""

import pytest
import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats import E2M1, LlmFp4, Minifloat, Uniform
from fxquant.formats.llm_fp4 import additive_biases, bias_for, published_biases, qparams_of, split, splits

X = torch.tensor([[0, 0.05, 0.11, -0.3, 0.45, 0.8, -1.3, 2.4, 3]])


def with_bias(bias: float) -> dict[str, Tensor]:
    return dict(qparams_of(torch.tensor([[bias]])))


@pytest.mark.parametrize(
    ("form", "values"),
    [
        (split(3, 0), [0, 2, 4, 8, 16, 32, 64, 128]),
        (split(2, 1), [0, 1, 2, 3, 4, 6, 8, 12]),
        (split(1, 2), [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        (split(2, 2), [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14]),
    ],
)
def test_the_grids_with_bias_0(form: LlmFp4, values: list[float]) -> None:
    assert form.grid.decode(torch.arange(len(values))).tolist() == values


def test_the_greatest_value_of_e3m2() -> None:
    assert split(3, 2).grid.maximum == 224


def test_bias_1_of_e2m1_is_the_grid_of_ocp_and_bias_3_of_e3m0_reaches_16() -> None:
    assert torch.equal(split(2, 1).levels(with_bias(1))[0], E2M1.decode(torch.arange(16)))
    assert split(3, 0).levels(with_bias(3))[0, :8].tolist() == [0, 0.25, 0.5, 1, 2, 4, 8, 16]


def test_the_worked_example_of_e2m1() -> None:
    x = torch.tensor([[1, 2.4, 2.5, 2.6, 3.4, 3.5, 3.6, 5, 7, 9.9, 10, 13]])
    assert split(2, 1).fake_quant(x, with_bias(0)).tolist() == [[1, 2, 2, 3, 3, 4, 4, 4, 8, 8, 8, 12]]


@pytest.mark.parametrize(
    ("form", "bias", "error"),
    [(split(2, 1), 2, 0.0246778), (split(3, 0), 5.415037, 0.0460026), (split(1, 2), 0.222392, 0.0071608)],
    ids=lambda value: value.name if isinstance(value, LlmFp4) else str(value),
)
def test_the_worked_examples_of_the_splits(form: LlmFp4, bias: float, error: float) -> None:
    exponent_bits, mantissa_bits = form.grid.exponent_bits, form.grid.mantissa_bits
    assert bias_for(3, exponent_bits, mantissa_bits) == pytest.approx(bias, abs=1e-6)
    qparams = form.fit(X)
    assert float(-torch.log2(qparams["scale"])) == pytest.approx(bias, abs=1e-6)
    assert float((form.fake_quant(X, qparams) - X).square().mean()) == pytest.approx(error, abs=2e-7)


def test_e2m1_of_the_worked_example_by_value() -> None:
    assert split(2, 1).fake_quant(X, with_bias(2)).tolist() == [[0, 0, 0, -0.25, 0.5, 0.75, -1.5, 2, 3]]


def test_e1m2_is_the_symmetric_integer_of_4_bits() -> None:
    integer = Uniform(4, is_symmetric=True)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(split(1, 2).fake_quant(x, split(1, 2).fit(x)), integer.fake_quant(x, integer.fit(x)), rtol=1e-6)


def test_the_fitted_scale_is_that_of_a_scaled_minifloat() -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    assert torch.equal(split(2, 1).fake_quant(x, split(2, 1).fit(x)), Minifloat(E2M1).fake_quant(x, Minifloat(E2M1).fit(x)))


@pytest.mark.parametrize("rounding", ["paper", "code"])
@pytest.mark.parametrize(
    ("maxima", "biases", "shifts", "reached"),
    [
        ([0.2, 0.9, 6, 48], [5.906891, 3.736966, 1.0, -2.0], [3, 3, 3, 0], [6, 6, 6, 48]),
        ([8, 1, 0.3, 0.02], [0.584962, 3.584962, 5.321928, 9.228819], [0, 3, 3, 3], [8, 1, 1, 1]),
    ],
)
def test_the_worked_examples_of_pre_shifts(
    rounding: str, maxima: list[float], biases: list[float], shifts: list[int], reached: list[float]
) -> None:
    assert [bias_for(maximum, 2, 1) for maximum in maxima] == pytest.approx(biases, abs=1e-6)
    form = split(2, 1, "paper" if rounding == "paper" else "code")
    qparams = form.fit(torch.tensor(maxima)[:, None])
    assert torch.allclose(-torch.log2(qparams["scale"]), torch.full((4, 1), min(biases)), atol=1e-5)
    assert qparams["shift"].view(-1).tolist() == shifts
    assert (form.grid.maximum * form.step(qparams)).view(-1).tolist() == pytest.approx(reached)


def test_a_shifted_channel_is_the_tensor_format_of_the_shifted_numbers() -> None:
    x = torch.tensor([[0.15, -0.7, 4, -40], [0.02, 0.33, -1.1, 20]])
    form, tensor = split(2, 1, "paper"), split(2, 1)
    qparams = form.fit(torch.tensor([[0.2], [0.9], [6], [48]]))
    out = form.fake_quant(x.T, qparams).T
    assert out.tolist() == [[0, -0.5, 4, -32], [0, 0.5, -1, 16]]
    powers = torch.exp2(qparams["shift"]).T
    shared = tensor.fake_quant(x * powers, {"scale": qparams["scale"][:1]})
    assert shared.tolist() == [[0, -4, 32, -32], [0, 4, -8, 16]]
    assert torch.equal(shared / powers, out)


def test_the_two_published_roundings_of_shifts_differ_where_fractions_meet() -> None:
    maxima = torch.tensor([12.0, 12 * 2.0**-1.3]) * 2.0**-0.4  # biases 0.4 and 1.7
    shifts = {rounding: split(2, 1, rounding).fit(maxima[:, None])["shift"].view(-1).tolist() for rounding in ("paper", "code")}
    assert shifts == {"paper": [0, 1], "code": [0, 2]}


@pytest.mark.parametrize(("bits", "names"), [(4, ["e3m0", "e2m1", "e1m2"]), (6, ["e5m0", "e4m1", "e3m2", "e2m3", "e1m4"])])
def test_the_splits_of_a_width(bits: int, names: list[str]) -> None:
    assert [form.grid.name for form in splits(bits)] == names


def test_8_bits_have_5_splits_and_other_widths_none() -> None:
    assert [form.grid.mantissa_bits for form in splits(8)] == [2, 3, 4, 5, 6]
    with pytest.raises(FormatError, match="4, 6 and 8 bits, not 5"):
        splits(5)


@pytest.mark.parametrize(
    ("bias", "ratios"),
    [(5.415, [41.1, 6.53, 1, 0.472]), (0.2224, [1.165, 1.080, 1, 0.970]), (-2, [0.253, 0.5, 1, 1.32])],
)
def test_a_grid_of_factors_moves_the_range_by_the_bias(bias: float, ratios: list[float]) -> None:
    factors = torch.tensor([0.01, 0.5, 1, 1.2])
    assert torch.exp2(bias - factors * bias).tolist() == pytest.approx(ratios, rel=5e-3)


def test_candidates_of_biases() -> None:
    biases = torch.tensor([[2.0], [-1.0]])
    published, additive = published_biases(biases), additive_biases(biases)
    assert published.shape == (100, 2, 1)
    assert published[0].view(-1).tolist() == pytest.approx([0.02, -0.01])
    assert float(published[-1, 0]) == pytest.approx(2 * (0.01 + 1.19 * 0.99))
    assert float(additive[0, 0]) == 1
    assert float(additive[-1, 1]) == pytest.approx(2)


def test_a_grid_with_a_bias_of_its_own_is_refused() -> None:
    with pytest.raises(FormatError, match="bias 0"):
        LlmFp4(E2M1)
