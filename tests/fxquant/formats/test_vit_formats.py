"""SULQ, TanQ, twin uniform and binary formats: worked examples; the examples of the docstrings."""

import doctest
import importlib

import pytest
import torch

from fxquant.errors import FormatError
from fxquant.formats import SignBinary, SoftmaxBinary, Sulq, TanQ, TwinGelu, TwinSoftmax

A = torch.tensor([[1, 0.7, 0.5, 0.3, 0.1, 0.02, 1e-3, 0]])
ONE = torch.ones(1, 1)
FILES = ["adalog", "binary", "log2", "log_sqrt2", "sulq", "tanq", "twin_uniform"]


@pytest.mark.parametrize("file", FILES)
def test_the_example_in_the_docstring(file: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fxquant.formats.{file}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("shift", "step", "codes", "error"),
    [
        (0.01, 0.951173, [0, 1, 1, 2, 3, 5, 7, 7], 6.0177e-3),
        (0.001, 1.423889, [0, 0, 1, 1, 2, 4, 6, 7], 1.6201e-2),
        (0.05, None, [0, 1, 1, 3, 4, 6, 7, 7], 1.0981e-2),
    ],
)
def test_the_worked_examples_of_sulq(shift: float, step: float | None, codes: list[int], error: float) -> None:
    form = Sulq(3)
    qparams = form.fit_with(A, shift)
    assert step is None or float(qparams["step"]) == pytest.approx(step, abs=1e-6)
    assert form.quantize(A, qparams).tolist() == [codes]
    assert float((form.fake_quant(A, qparams) - A).square().mean()) == pytest.approx(error, rel=1e-4)


def test_the_values_and_exponents_of_sulq() -> None:
    form = Sulq(3)
    values = form.fake_quant(A, form.fit_with(A, 0.01))[0].tolist()
    assert values == pytest.approx([0.99, 0.49, 0.49, 0.24, 0.115, 0.02125, -0.0021875, -0.0021875])
    for shift, exponents in ((0.001, [0, 0, 1, 1, 3, 6, 9, 10]), (0.05, [0, 1, 1, 2, 2, 4, 4, 4])):
        qparams = form.fit_with(A, shift)
        assert form.exponents(form.quantize(A, qparams), qparams).tolist() == [exponents]


@pytest.mark.parametrize(
    ("width", "shift", "distinct"), [(4, 0.001, 11), (4, 0.01, 8), (4, 0.05, 5), (3, 0.001, 8), (3, 0.01, 8), (3, 0.05, 5)]
)
def test_codes_of_sulq_collapse(width: int, shift: float, distinct: int) -> None:
    form = Sulq(width)
    levels = form.levels(form.fit_with(torch.tensor([[0.0, 1.0]]), shift))
    assert len(levels.unique()) == distinct


def test_the_gradient_of_sulq_is_that_of_its_logarithm() -> None:
    x = torch.tensor([[0.3, 2.0, 0.0]], requires_grad=True)
    form = Sulq(3)
    form.fake_quant(x, form.fit_with(A, 0.01)).sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([0.25 / 0.31, 0, 0])


GRIDS = [
    (False, 1.3, [0, 0.05216, 0.10813, 0.17295, 0.25495, 0.37114, 0.56528, 1]),
    (False, 1.0, [0, 0.09236, 0.18862, 0.29337, 0.41286, 0.55670, 0.74153, 1]),
    (True, 1.0, [0, 0.218921, 0.418666, 0.588552, 0.727233, 0.838573, 0.927866, 1]),
]


@pytest.mark.parametrize(("is_inverse", "angle", "levels"), GRIDS)
def test_the_grids_of_tanq(is_inverse: bool, angle: float, levels: list[float]) -> None:
    found = TanQ(3, is_inverse).levels({"scale": ONE, "angle": angle * ONE})
    assert found[0].tolist() == pytest.approx(levels, abs=1e-5)
    assert found[0, 7] == 1


@pytest.mark.parametrize(
    ("is_inverse", "angle", "codes", "values"),
    [
        (False, 1.3, [7, 6, 6, 4, 2, 0, 0, 0], [1, 0.56528, 0.56528, 0.25495, 0.10813, 0, 0, 0]),
        (True, 1.0, [7, 4, 2, 1, 0, 0, 0, 0], [1, 0.727233, 0.418666, 0.218921, 0, 0, 0, 0]),
    ],
)
def test_the_worked_examples_of_tanq(is_inverse: bool, angle: float, codes: list[int], values: list[float]) -> None:
    form, qparams = TanQ(3, is_inverse), {"scale": ONE, "angle": angle * ONE}
    assert form.quantize(A, qparams).tolist() == [codes]
    assert form.fake_quant(A, qparams)[0].tolist() == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("is_inverse", [False, True])
def test_tanq_without_an_angle_is_uniform(is_inverse: bool) -> None:
    levels = TanQ(3, is_inverse).levels({"scale": ONE, "angle": 1e-4 * ONE})
    assert levels[0].tolist() == pytest.approx([code / 7 for code in range(8)])


@pytest.mark.parametrize("is_inverse", [False, True])
def test_the_gradient_of_tanq_is_that_of_both_curves(is_inverse: bool) -> None:
    form, qparams = TanQ(3, is_inverse), {"scale": 0.9 * ONE, "angle": ONE}
    x = torch.tensor([[0.31, 0.62]], requires_grad=True)
    value = form.fake_quant(x, qparams)
    value.sum().backward()
    assert x.grad is not None
    exact = value.detach().to(torch.float64)
    ratio = _code_slope(x.detach().to(torch.float64), is_inverse) / _code_slope(exact, is_inverse)
    assert x.grad.tolist() == [pytest.approx(ratio[0].tolist(), rel=1e-5)]


def _code_slope(x: torch.Tensor, is_inverse: bool) -> torch.Tensor:
    """The derivative, by autograd, of the code before rounding, for θ = 1 and δ = 0.9."""
    leaf, tangent = x.clone().requires_grad_(), torch.tan(torch.ones((), dtype=torch.float64))
    code = torch.tan(leaf / 0.9) if is_inverse else torch.atan(tangent * leaf / 0.9)
    return torch.autograd.grad(code.sum(), leaf)[0]


@pytest.mark.parametrize(
    ("width", "split", "ranges", "magnitudes", "values"),
    [
        (
            4,
            3,
            [1, 1, 1, 1, 0, 0, 0, 0],
            [7, 5, 4, 2, 6, 1, 0, 0],
            [1, 0.714286, 0.571429, 0.285714, 0.107143, 0.017857, 0, 0],
        ),
        (
            8,
            5,
            [1, 1, 1, 1, 1, 0, 0, 0],
            [127, 89, 64, 38, 13, 81, 4, 0],
            [1, 0.700787, 0.503937, 0.299213, 0.102362, 0.019931, 0.000984, 0],
        ),
    ],
)
def test_the_worked_examples_of_twin_softmax(
    width: int, split: int, ranges: list[int], magnitudes: list[int], values: list[float]
) -> None:
    form, qparams = TwinSoftmax(width), {"split": split * ONE}
    codes = form.quantize(A, qparams)
    assert (codes // form.half).tolist() == [ranges]
    assert (codes % form.half).tolist() == [magnitudes]
    assert form.fake_quant(A, qparams)[0].tolist() == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("split", range(20))
def test_twin_softmax_rises_and_codes_its_levels_as_themselves(width: int, split: int) -> None:
    form, qparams = TwinSoftmax(width), {"split": split * ONE}
    values = form.fake_quant(torch.linspace(0, 1.1, 4001)[None], qparams)
    assert (values.diff() >= 0).all()
    assert torch.equal(form.fake_quant(values, qparams), values)


def test_the_worked_example_of_twin_gelu() -> None:
    form, qparams = TwinGelu(4), {"ratio": 5 * ONE}
    x = torch.tensor([[-0.17, -0.1, -0.02, 0, 0.05, 0.4, 1.7, 3.2]])
    codes = form.quantize(x, qparams)
    assert torch.where(codes < 8, codes, 0).tolist() == [[0, 0, 0, 0, 0, 1, 3, 5]]
    assert torch.where(codes < 8, 0, 7 - codes).tolist() == [[-8, -5, -1, 0, 0, 0, 0, 0]]
    wanted = [-0.169971, -0.106232, -0.021246, 0, 0, 0.679885, 2.039655, 3.399425]
    assert form.fake_quant(x, qparams)[0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert float(form.fit(x)["ratio"]) == 5


ROW = torch.tensor([[0.5, 0.25, 0.12, 0.06, 0.04, 0.02, 0.008, 0.002]])


def test_the_worked_example_of_binary_softmax() -> None:
    form = SoftmaxBinary(is_scaled=True)
    thresholds = [float(form.fit_by_descent(ROW, rounds)["threshold"]) for rounds in (1, 2, 3, 4, 5)]
    assert thresholds == pytest.approx([0.0625, 0.145, 0.1875, 0.1875, 0.1875])
    qparams = form.fit(ROW)
    assert float(qparams["threshold"]) == 0.125
    assert form.quantize(ROW, qparams).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert form.quantize(ROW, form.fit_by_descent(ROW)).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert float(qparams["scale"]) == 0.375
    assert float((form.fake_quant(ROW, qparams) - ROW).square().sum()) == pytest.approx(0.051318, abs=1e-6)
    plain = SoftmaxBinary()
    assert float((plain.fake_quant(ROW, plain.fit(ROW)) - ROW).square().sum()) == pytest.approx(0.832568, abs=1e-6)


def test_the_worked_example_of_binary_weights() -> None:
    row = torch.tensor([[0.3, -0.1, 0.05, -0.4]])
    form = SignBinary()
    qparams = form.fit(row)
    assert float(qparams["center"]) == pytest.approx(-0.0375)
    assert form.fake_quant(row, qparams)[0].tolist() == pytest.approx([0.2125, -0.2125, 0.2125, -0.2125])
    assert form.quantize(qparams["center"], qparams).tolist() == [[1]]


def test_the_gradient_of_a_binary_activation_is_one_inside_of_one() -> None:
    x = torch.tensor([[-2.0, -0.5, 0.0, 0.99, 1.0]], requires_grad=True)
    form = SignBinary(is_activation=True)
    form.fake_quant(x, form.fit(x.detach())).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_a_masked_row_of_probabilities_is_coded_as_zeros() -> None:
    form, rows = SoftmaxBinary(), torch.tensor([[0.0, 0.0], [0.9, 0.1]])
    assert form.fake_quant(rows, form.fit(rows)).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("family", [Sulq, TanQ, TwinSoftmax, TwinGelu])
def test_widths_that_are_no_format_are_refused(family: type[Sulq]) -> None:
    with pytest.raises(FormatError, match="2 to 8 bits, not 9"):
        family(9)


@pytest.mark.parametrize("width", [3, 8])
@pytest.mark.parametrize("low", [0.0, 0.5, 0.509, 0.51])
def test_the_table_of_sulq_is_exact_though_codes_collapse(width: int, low: float) -> None:
    form = Sulq(width)
    qparams = form.fit(torch.tensor([[low, 0.51]]))
    x = torch.cat([torch.linspace(0, 1, 20001), torch.linspace(0.508, 0.511, 50001)])
    assert torch.equal(form.table(qparams).quantize(x), form.quantize(x[None], qparams)[0])
