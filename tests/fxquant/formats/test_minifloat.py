"""Float grids against ml_dtypes on every bfloat16 and float16, and Minifloat's scale."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.errors import FormatError
from fxquant.formats import E2M1, E2M3, E3M2, E4M3, E5M2, INT8, FixedGrid, FloatGrid, Minifloat
from fxquant.formats.grids import power_of_two

PEERS = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E3M2: ml_dtypes.float6_e3m2fn,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
}
GRIDS = pytest.mark.parametrize("grid", PEERS, ids=lambda grid: grid.name)


def every(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit float type, NaN and both zeros included, as float32."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(torch.float32)


def peer_codes(grid: FloatGrid, x: Tensor) -> Tensor:
    """ml_dtypes' codes; it saturates where the grid has no special codes, so all are asked to code clamped numbers."""
    clamped = x.clamp(-grid.maximum, grid.maximum)
    return torch.from_numpy(clamped.numpy().astype(PEERS[grid]).view(np.uint8).astype(np.int64))


@GRIDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_has_the_code_of_ml_dtypes(grid: FloatGrid, dtype: torch.dtype) -> None:
    x = every(dtype)
    numbers = x[~torch.isnan(x)]
    assert torch.equal(grid.encode(numbers), peer_codes(grid, numbers))


@GRIDS
def test_ties_and_their_neighbours_have_the_code_of_ml_dtypes(grid: FloatGrid) -> None:
    levels = grid.decode(torch.arange(grid.greatest_code + 1))
    ties = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([ties, torch.nextafter(ties, torch.tensor(math.inf)), torch.nextafter(ties, torch.tensor(0.0))])
    assert torch.equal(grid.encode(torch.cat([x, -x])), peer_codes(grid, torch.cat([x, -x])))
    assert (grid.encode(ties) % 2 == 0).all()


@GRIDS
def test_every_code_has_the_value_of_ml_dtypes(grid: FloatGrid) -> None:
    codes = torch.arange(1 << grid.bits)
    wanted = torch.from_numpy(codes.numpy().astype(np.uint8).view(PEERS[grid]).astype(np.float32))
    values = grid.decode(codes)
    assert torch.equal(torch.isnan(values), torch.isnan(wanted))
    assert torch.equal(values.nan_to_num(0).view(torch.int32), wanted.nan_to_num(0).view(torch.int32))


@pytest.mark.parametrize(
    "grid", [*PEERS, INT8, *(FloatGrid(e, m, 0) for e, m in ((3, 0), (1, 2), (5, 0), (5, 2), (1, 6)))], ids=str
)
def test_the_nearest_value_is_that_of_the_code(grid: FloatGrid | FixedGrid) -> None:
    x = torch.cat([every(torch.bfloat16), every(torch.float16)])
    x = x[~torch.isnan(x)]
    assert torch.equal(grid.nearest(x).view(torch.int32), grid.decode(grid.encode(x)).view(torch.int32))
    assert grid.nearest(torch.tensor([math.nan])).tolist() == [0], "0 / 0 in a block of zeros"


@GRIDS
def test_infinity_and_what_lies_above_the_maximum_saturate(grid: FloatGrid) -> None:
    x = torch.tensor([math.inf, 3e38, 1.5 * grid.maximum])
    assert (grid.decode(grid.encode(x)) == grid.maximum).all()
    assert (grid.decode(grid.encode(-x)) == -grid.maximum).all()


@GRIDS
def test_nan_takes_the_code_of_nan_where_there_is_one(grid: FloatGrid) -> None:
    code = grid.encode(torch.tensor([math.nan]))
    assert bool(torch.isnan(grid.decode(code))) == (grid.special != "none")


@pytest.mark.parametrize(
    ("grid", "maximum", "normal", "subnormal"),
    [
        (E5M2, 57344, 2**-14, 2**-16),
        (E4M3, 448, 2**-6, 2**-9),
        (E3M2, 28, 0.25, 0.0625),
        (E2M3, 7.5, 1, 0.125),
        (E2M1, 6, 1, 0.5),
    ],
)
def test_the_limits_of_the_grids(grid: FloatGrid, maximum: float, normal: float, subnormal: float) -> None:
    assert grid.maximum == maximum
    levels = grid.decode(torch.tensor([1, 1 << grid.mantissa_bits]))
    assert levels.tolist() == [subnormal, normal]


def test_the_values_of_e2m1_by_code() -> None:
    assert E2M1.decode(torch.arange(8)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_e4m3_rounds_half_of_its_least_number_to_zero() -> None:
    assert E4M3.decode(E4M3.encode(torch.tensor([2.0**-10, 1.001 * 2.0**-10]))).tolist() == [0, 2**-9]


def test_int8_is_twos_complement_sixty_fourths_without_minus_two() -> None:
    x = torch.tensor([0.0, 1 / 64, -1 / 64, 1.0, -3.0, 3.0, 0.5 / 64, 1.5 / 64, math.inf, -math.inf, math.nan])
    codes = INT8.encode(x)
    assert codes.tolist() == [0, 1, 255, 64, 129, 127, 0, 2, 127, 129, 0]
    assert INT8.decode(codes).tolist() == [0, 1 / 64, -1 / 64, 1, -127 / 64, 127 / 64, 0, 2 / 64, 127 / 64, -127 / 64, 0]


def test_powers_of_two_are_exact_and_stop_at_the_least_scale() -> None:
    exponents = range(-127, 128)
    assert power_of_two(torch.tensor(exponents)).tolist() == [2.0**exponent for exponent in exponents]
    assert float(power_of_two(torch.tensor(-200))) == 2.0**-127


def test_the_largest_magnitude_becomes_the_greatest_level() -> None:
    blocks = torch.tensor([[0.5, -12.0, 3.0], [0.0, 0.0, 0.0]])
    form = Minifloat(E2M1)
    qparams = form.fit(blocks)
    assert float(qparams["scale"][0]) == 2
    assert form.fake_quant(blocks, qparams).tolist() == [[0, -12, 3], [0, 0, 0]]  # 0.25 is a tie: to the even code 0


def test_grids_that_do_not_fit_a_byte_are_refused() -> None:
    with pytest.raises(FormatError, match="8 bits or fewer"):
        FloatGrid(5, 3, 15)


def test_small_multiples_of_an_fp8_scale_are_rounded_once_more() -> None:
    """linear-layers section 9: FireQ's kernel reads k σ as E4M3; with σ = 1.125 that is off by up to 3.7 %."""
    k = torch.arange(-8.0, 8)
    products = E4M3.decode(E4M3.encode(k * 1.125))
    assert dict(zip(k.tolist(), products.tolist(), strict=True)).items() >= {-7: -8.0, -6: -7.0, -5: -5.5, -3: -3.5}.items()
    error = (products / (k * 1.125) - 1)[k != 0].abs()
    assert float(error.max()) == pytest.approx(0.037, abs=5e-4)
