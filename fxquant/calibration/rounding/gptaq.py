"""GPTAQ: GPTQ whose goal is the float model's output, although its input comes through quantized layers.

With X the rows as the quantized model has them, F those of the float one, D = (2 / n) (F - X)ᵀ X and U as in ``gptq``::

    P = α triu(D Uᵀ, 1) U        W[:, j:] -= e U[j, j:] - w_j P[j, j:]        α = 1/4

arXiv 2504.02692 and its repository, which uses w_j as it was before rounding inside of a block and q_j beyond it; w_j in both
here (the difference is of second order).
"""

from torch import Tensor

from fxquant.calibration.rounding.gptq import DEFAULT, Options, solve
from fxquant.calibration.seen import Seen

STRENGTH = 0.25  # α of the repository


def round_weight(
    weight: Tensor, bits: int, group: int, seen: Seen, options: Options = DEFAULT, strength: float = STRENGTH
) -> tuple[Tensor, Tensor]:
    """codes int8 [N, K] and scale float32 [N] or [N, G].

    Raises:
        CalibrationError: hessian or cross is missing or does not fit.
    """
    hessian, cross = seen.need("hessian", "gptaq"), seen.need("cross", "gptaq")
    return solve(weight, bits, group, hessian, cross, strength, options)
