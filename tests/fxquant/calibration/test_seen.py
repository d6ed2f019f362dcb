"""Statistics of an input: what they are, what a migration does to them, what is missing is named."""

import pytest
import torch

from fxquant.calibration.seen import Seen, see
from fxquant.errors import CalibrationError


def test_statistics_divided_by_a_factor_are_those_of_the_divided_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, float_rows = (torch.randn(20, 6, generator=generator) for _ in range(2))
    factor = torch.tensor([1.0, 2, 0.5, 4, 0.25, 8])
    divided, again = see(rows, float_rows).divided(factor), see(rows / factor, float_rows / factor)
    for name in ("hessian", "cross", "absmax", "mean", "mean_square", "mean_abs", "rows", "float_rows"):
        torch.testing.assert_close(divided.need(name, "test"), again.need(name, "test"))
    assert divided.tokens == 20


def test_what_is_missing_stays_missing_and_is_named() -> None:
    seen = Seen(3, absmax=torch.ones(2)).divided(torch.ones(2))
    with pytest.raises(CalibrationError, match=r"gptq needs .*'hessian'.* there is Seen\(3 tokens: absmax\)"):
        seen.need("hessian", "gptq")
    assert str(Seen(0)) == "Seen(0 tokens: nothing)"


def test_rows_must_be_a_matrix() -> None:
    with pytest.raises(CalibrationError, match=r"rows \[n, K\] with n ≥ 1"):
        see(torch.ones(0, 3))
