"""The operator fxquant::rows: a chain of row-wise work as a small program on registers of rows.

A register holds ``width`` float32 values of every row. It lives in scratch memory (place -1), or is input number
``place``; an output names the register it is made of and the input whose leading sizes it takes. An instruction is seven
integers ``(op, dst, a, b, first, second, third)``; ``Op`` says what they mean. The table stands in
lowering/cpu/program_stages.h as well.
"""

from enum import IntEnum

from torch import Tensor

from fxquant.ops.library import define


class Op(IntEnum):
    """dst and a are registers. Vectors are indices into params, -1 where an optional one is missing."""

    LINEAR = 0  # dst = linear(a); b: packed weight, first: bias or -1, second and third: bits of weight and activation
    LINEAR_STATIC = 1  # the same; second: steps, params[second + 1]: zero point; third: bits of activation
    LAYER_NORM = 2  # first, second: weight and bias or -1; third: index of eps in constants
    RMS_NORM = 3  # first: weight or -1; third: index of eps
    GELU_ERF = 4
    GELU_TANH = 5
    SILU = 6
    RELU = 7
    ADD = 8  # dst = a + b
    MUL = 9  # dst = a * b
    ADD_ROW = 10  # dst = a + params[first] in every row
    MUL_ROW = 11


FIELDS = 7


def _rows(
    inputs: list[Tensor],
    packed: list[Tensor],
    params: list[Tensor],
    registers: list[int],
    program: list[int],
    constants: list[float],
    outputs: list[int],
) -> list[Tensor]:
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    return [inputs[like].new_empty((*inputs[like].shape[:-1], registers[2 * reg])) for reg, like in pairs]


define(
    "rows(Tensor[] inputs, Tensor[] packed, Tensor[] params, int[] registers, int[] program, float[] constants,"
    " int[] outputs) -> Tensor[]",
    _rows,
    is_hot=True,
)
