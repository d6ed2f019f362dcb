"""bitsandbytes' tables: the worked example, the generator of NF4, ties, double quantization."""

import math
from statistics import NormalDist

import pytest
import torch

from fxquant.formats import FP4_BNB, NF4, NF4_DOUBLE
from fxquant.formats.nf4 import double_quantized, dynamic_map

X = torch.tensor([[0.1, -0.4, 0.25, 0.8, -0.05, 0, 0.33, -0.79]])
ONE = {"scale": torch.ones(1, 1)}


def test_the_worked_example_of_nf4() -> None:
    qparams = NF4.fit(X)
    codes = NF4.quantize(X, qparams)[0]
    assert codes.tolist() == [9, 2, 11, 15, 6, 7, 12, 0]
    assert [int(high) << 4 | int(low) for high, low in codes.view(-1, 2)] == [0x92, 0xBF, 0x67, 0xC0]
    wanted = [0.128744, -0.420058, 0.270332, 0.8, -0.07284, 0, 0.352568, -0.8]
    assert NF4.fake_quant(X, qparams)[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_nf4_has_the_quantiles_of_a_normal_distribution() -> None:
    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(0.9677083 + (0.5 - 0.9677083) * i / count) for i in range(count)]

    raw = sorted([*quantiles(8), 0.0, *(-value for value in quantiles(7))])
    assert list(NF4.values) == pytest.approx([value / max(raw) for value in raw], abs=1e-6)


def test_the_thresholds_of_nf4() -> None:
    wanted = [-0.848096, -0.610633, -0.459995, -0.339679, -0.234607, -0.137912, -0.045525, 0.039790]
    wanted += [0.120255, 0.203521, 0.292014, 0.389313, 0.501663, 0.642787, 0.861478]
    assert list(NF4.thresholds) == pytest.approx(wanted, abs=1e-6)


def test_a_tie_of_nf4_takes_the_lower_value() -> None:
    assert NF4.quantize(torch.tensor([NF4.thresholds]), ONE).tolist() == [list(range(15))]


def test_the_values_of_fp4_by_code() -> None:
    magnitudes = [0, 0.00520833, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25]
    assert list(FP4_BNB.values) == pytest.approx([*magnitudes, *(-size for size in magnitudes)], abs=1e-7)
    assert math.copysign(1, FP4_BNB.values[8]) == -1


def test_a_tie_of_fp4_takes_the_smaller_magnitude() -> None:
    ties = torch.tensor([FP4_BNB.thresholds])
    wanted = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    assert ties[0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert FP4_BNB.quantize(ties, ONE).tolist() == [[0, 1, 6, 7, 4, 5, 2]]
    assert FP4_BNB.quantize(-ties, ONE).tolist() == [[8, 9, 14, 15, 12, 13, 10]]


def test_zero_of_either_sign_is_code_0_of_fp4() -> None:
    assert FP4_BNB.quantize(torch.tensor([[0.0, -0.0, -1e-9]]), ONE).tolist() == [[0, 0, 8]]


def test_the_dynamic_map_has_256_values_with_seven_decades_a_side() -> None:
    levels = dynamic_map()
    assert len(levels.unique()) == 256
    assert float(levels[0]) == pytest.approx(-0.992969, abs=1e-6)
    assert levels[-1] == 1
    assert (levels == 0).sum() == 1
    assert float(levels[levels > 0].min()) == pytest.approx(0.55e-6, rel=1e-6)


def test_double_quantization_takes_the_nearest_entry_of_the_map() -> None:
    absmax = torch.rand(600, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    mean = absmax.mean()
    decoded = double_quantized(absmax)
    for start in (0, 256, 512):
        rows, got = absmax[start : start + 256] - mean, decoded[start : start + 256]
        scale = rows.abs().max()
        nearest = dynamic_map()[((rows / scale) - dynamic_map()).abs().argmin(1)]
        assert torch.allclose(got.view(-1), nearest * scale + mean, atol=1e-6)


def test_double_quantized_codes_are_those_of_the_exact_magnitudes() -> None:
    blocks = torch.randn(300, 64, generator=torch.Generator().manual_seed(3))
    double, single = NF4_DOUBLE.fit(blocks), NF4.fit(blocks)
    assert torch.equal(NF4_DOUBLE.quantize(blocks, double), NF4.quantize(blocks, single))
    assert not torch.equal(double["scale"], single["scale"])
    assert torch.allclose(double["scale"], single["scale"], rtol=0.02)
