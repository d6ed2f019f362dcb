"""Uniform formats: worked examples, and the table form against quantize on every bfloat16."""

import pytest
import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats import Uniform

X = torch.tensor([-0.9, -0.35, 0, 0.12, 0.5, 1.31, 2.1])


def all_bfloat16() -> Tensor:
    """Every bfloat16 but NaN, as float32."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    return x[~torch.isnan(x)]


def test_the_worked_example_of_affine_codes() -> None:
    form = Uniform(4)
    codes = form.quantize(X, {"scale": torch.tensor(0.2), "zero_point": torch.tensor(4.0)})
    assert codes.tolist() == [0, 2, 4, 5, 6, 11, 14]


def test_the_worked_example_of_symmetric_codes() -> None:
    form = Uniform(4, is_symmetric=True)
    qparams = form.fit(X[None])
    assert float(qparams["scale"]) == pytest.approx(0.3)
    assert (form.quantize(X[None], qparams) - 7).tolist() == [[-3, -1, 0, 0, 2, 4, 7]]


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_table_form_gives_the_same_codes_and_values(width: int, is_symmetric: bool, power_of_two: bool) -> None:
    form = Uniform(width, is_symmetric, power_of_two)
    qparams = form.fit(X[None])
    table, x = form.table(qparams), all_bfloat16()
    assert torch.equal(table.quantize(x), form.quantize(x, {k: v.reshape(1) for k, v in qparams.items()}))
    assert torch.equal(table.fake_quant(x), form.fake_quant(x[None], qparams)[0])


def test_values_are_coded_as_themselves() -> None:
    form = Uniform(3)
    qparams = form.fit(X[None])
    levels = form.levels(qparams)
    assert torch.equal(form.fake_quant(levels, qparams), levels)
    assert 0.0 in levels


def test_the_gradient_is_one_inside_and_zero_where_clipped() -> None:
    x = torch.tensor([[-5.0, 0.3, 5.0]], requires_grad=True)
    Uniform(4, is_symmetric=True).fake_quant(x, {"scale": torch.tensor([[0.3]])}).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 0]]


def test_nan_stays_nan() -> None:
    form = Uniform(4)
    out = form.fake_quant(torch.tensor([[float("nan"), 1.0, float("inf")]]), form.fit(X[None]))
    assert torch.isnan(out[0, 0])
    assert torch.isfinite(out[0, 1:]).all()


def test_widths_that_are_no_format_are_refused() -> None:
    with pytest.raises(FormatError, match="2 to 8 bits, not 9"):
        Uniform(9)


ONE = {"scale": torch.ones(1, 1), "zero_point": torch.full((1, 1), 3.0)}


def test_ties_go_to_the_even_code_before_the_zero_point_is_added() -> None:
    """rne(x / s) + z: of 0.5 and z = 3 that is 3, where rne(x / s + z) would be 4; rne is not floor(t + 0.5)."""
    halves = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    assert Uniform(4).quantize(halves, ONE).tolist() == [[3, 5, 5, 3, 1]]


def test_codes_are_made_by_division() -> None:
    """x / s and x · (1 / s) are on different sides of a tie for some x."""
    scale = torch.tensor([[0.3]])
    ties = (torch.arange(60) + 0.5)[None] * scale
    codes = Uniform(8).quantize(ties, {"scale": scale, "zero_point": torch.zeros(1, 1)})
    assert torch.equal(codes, torch.round(ties / scale).to(torch.int64))
    assert not torch.equal(codes, torch.round(ties * (1 / scale)).to(torch.int64))


def test_a_code_beyond_the_last_one_is_clipped_and_fits_into_its_nibble() -> None:
    """linear-layers section 2: the range -7.5 .. 7.5 has z = 8, and 7.5 would get the code 16."""
    form, x = Uniform(4), torch.tensor([[-7.5, -3, 0, 2, 7.5]])
    qparams = form.fit(x)
    assert (float(qparams["scale"]), float(qparams["zero_point"])) == (1, 8)
    assert form.quantize(x, qparams).tolist() == [[0, 5, 8, 10, 15]]


def test_a_group_of_one_sign_has_zero_in_its_range() -> None:
    """linear-layers section 2: the extent of the values alone would decode all of [5, 5.5, 6] to 1."""
    form, x = Uniform(4), torch.tensor([[5, 5.5, 6]])
    qparams = form.fit(x)
    assert float(qparams["scale"]) == pytest.approx(0.4)
    assert form.quantize(x, qparams).tolist() == [[12, 14, 15]]
    zeros = form.fit(torch.zeros(1, 3))
    assert form.fake_quant(torch.zeros(1, 3), zeros).tolist() == [[0, 0, 0]]
