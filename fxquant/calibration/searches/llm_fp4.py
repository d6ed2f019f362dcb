"""FPQ's joint search: the split of exponent and mantissa and the real biases of a linear's weight and input.

The weight has a bias an output channel, the input the bias ρ of the tensor with a whole pre-shift β a channel
(``formats.llm_fp4``). A candidate is judged by the squared error of x Wᵀ, with the other operand as it was chosen last. The
weight takes the published candidates. Those of ρ are additive: the published ones are multiples of a logarithm that may be 0.
Every candidate of ρ has the shifts that the published code gives it (unconfirmed: whether they are made again for each).
Bias and split of an operand are chosen together, where the publication takes first both biases, then both splits.
vit-quantizers 10.2 and linear-layers 13.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fxquant.calibration.searches.metric import Candidates, Choice, choose
from fxquant.calibration.searches.product import OperandMetric, Product
from fxquant.errors import CalibrationError
from fxquant.formats import LlmFp4
from fxquant.formats.llm_fp4 import additive_biases, published_biases, splits
from fxquant.granularity import PerChannel, PerTensor

ROUNDS = 3
CHANNELS = PerChannel(-1)  # of an input [..., K]
LARGEST_BIAS = 60.0  # a scale below 2^-60 belongs to an input that is about zero


def llm_fp4(site: str, rows: Tensor, weight: Tensor, bits: tuple[int, int], rounds: int = ROUNDS) -> tuple[Choice, Choice]:
    """(input, weight): the choices for rows [R, K] and weight [N, K], float32, with ``bits`` of the weight and of the input.

    The input's qparams are those of ``PerChannel(-1)``, the weight's those of ``PerChannel(0)``.

    Raises:
        CalibrationError: a width has no published splits, or no candidate has a finite error.
    """
    if not {*bits} <= {4, 6, 8}:
        raise CalibrationError(f"{site}: fpq knows splits of 4, 6 and 8 bits, not of weights and inputs of {bits} bits")
    product = Product(site, rows, weight, PerTensor(), PerChannel(0))
    weights = [Candidates(form, {"scale": _scales(published_biases, form.fit(weight)["scale"])}) for form in splits(bits[0])]
    exact, coded, chosen = product.multiply(rows, weight), rows, None
    for _ in range(rounds):
        of_weight = choose(OperandMetric(product, "right", coded), weights)
        value = of_weight.fake_quant(weight, PerChannel(0))
        chosen = _input(site, rows, value, exact, bits[1])
        coded = chosen.fake_quant(rows, CHANNELS)
    assert chosen is not None
    return chosen, of_weight


def _input(site: str, rows: Tensor, weight: Tensor, exact: Tensor, bits: int) -> Choice:
    """The best split and ρ; ties keep the first."""
    best: Choice | None = None
    for form, qparams in _inputs(rows, bits):
        coded = CHANNELS.restore(form.nearest(CHANNELS.blocks(rows), qparams), rows)
        loss = (coded @ weight.T - exact).square().mean(dtype=torch.float64).reshape(1)
        if best is None or bool(loss < best.loss):
            best = Choice(form, qparams, loss)
    if best is None or not bool(torch.isfinite(best.loss).all()):
        raise CalibrationError(f"{site}: no candidate of a search has a finite loss; leave the site in float")
    return best


def _inputs(rows: Tensor, bits: int) -> Iterator[tuple[LlmFp4, dict[str, Tensor]]]:
    for plain in splits(bits):
        form = replace(plain, shift="code")
        biases = -torch.log2(plain.fit(CHANNELS.blocks(rows))["scale"])
        for least in additive_biases(biases.amin()).clamp(-LARGEST_BIAS, LARGEST_BIAS):
            yield form, {"scale": torch.exp2(-least).expand_as(biases), "shift": form.shifts(biases, least)}


def _scales(candidates: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    return torch.exp2(-candidates(-torch.log2(scale)).clamp(-LARGEST_BIAS, LARGEST_BIAS))
