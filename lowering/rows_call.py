"""fxquant::rows as a direct call from generated code: the program stands in the kernel, pointers and the row count come in.

Layers with equal programs share one compiled kernel. Several outputs are parts of one buffer, one after the other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from fxquant._compat import Inductor
from fxquant.lowering.linear_template import declarations
from fxquant.ops import FIELDS, Op, packed_bytes
from fxquant.schemes import WIDTHS


@dataclass(frozen=True)
class RowsCall:
    """``fxquant_rows`` on some pointers: ``kinds`` are the C types of inputs, packed weights and vectors, in this order."""

    kinds: tuple[str, ...]
    counts: tuple[int, int]  # of inputs and packed weights
    registers: tuple[int, ...]
    program: tuple[int, ...]
    constants: tuple[float, ...]
    results: tuple[int, ...]  # the register of each output
    function: str = "fxquant_rows"

    def arg_types(self) -> list[str]:
        """The C types of the kernel's arguments: the pointers and the output, an offset of each, the rows."""
        return [*self.kinds, "float*", *["const int64_t"] * (len(self.kinds) + 2)]

    def source(self, kernel_name: str, export: str, profile: tuple[str, str]) -> str:
        """The C++ kernel; ``profile`` is the header and the line that make it appear in profiles."""
        places = range(len(self.kinds) + 1)
        names = [*(f"p{i}" for i in places), *(f"o{i}" for i in places), "m"]
        arguments = ", ".join(f"{kind} {name}" for kind, name in zip(self.arg_types(), names, strict=True))
        pointers = [f"p{i} + o{i}" for i in places]
        inputs, packed = self.counts
        widths = [self.registers[2 * reg] for reg in self.results]
        outputs = [f"{pointers[-1]} + m * {sum(widths[:k])}" for k in range(len(widths))]
        arrays = "\n    ".join(
            f"{kind} {name}[] = {{{', '.join(map(str, values)) or '0'}}};"
            for kind, name, values in (
                ("const float* const", "inputs", pointers[:inputs]),
                ("const uint8_t* const", "packed", pointers[inputs : inputs + packed]),
                ("const void* const", "params", pointers[inputs + packed : -1]),
                ("float* const", "outputs", outputs),
                ("static const int64_t", "registers", self.registers),
                ("static const int64_t", "program", self.program),
                ("static const double", "constants", [repr(value) for value in self.constants]),
                ("static const int64_t", "results", self.results),
            )
        )
        header, line = profile
        return f"""{header}#include <cstdint>
#include <stdexcept>
{declarations((self.function,))}
extern "C" {export} void {kernel_name}({arguments})
{{
    {line}
    {arrays}
    {self.function}(m, inputs, packed, params, outputs, registers, {len(self.registers) // 2}, program,
        {len(self.program) // FIELDS}, constants, results, {len(self.results)});
}}
"""


def rows_lowering(inductor: Inductor) -> Callable[..., Any]:
    """fxquant::rows as a direct call, where every size is known to fit; the operator checks the others."""
    op = torch.ops.fxquant.rows.default

    def lower(
        inputs: Sequence[Any],
        packed: Sequence[Any],
        params: Sequence[Any],
        registers: Sequence[int],
        program: Sequence[int],
        constants: Sequence[float],
        outputs: Sequence[int],
    ) -> Any:
        if not _Fit(inductor, inputs, packed, params, registers, program, constants, outputs).holds():
            return inductor.fallback_handler(op)(inputs, packed, params, registers, program, constants, outputs)
        operands = [*map(inductor.realize_contiguous, (*inputs, *packed, *params))]
        names = {torch.float32: "const float*", torch.uint8: "const uint8_t*", torch.int32: "const int32_t*"}
        kinds = tuple(names[x.get_dtype()] for x in operands)
        results, leads = outputs[::2], [inputs[like].get_size()[:-1] for like in outputs[1::2]]
        call = RowsCall(kinds, (len(inputs), len(packed)), tuple(registers), tuple(program), tuple(constants), tuple(results))
        widths, rows = [registers[2 * reg] for reg in results], sympy.Mul(*leads[0])
        one = [*leads[0], sympy.Integer(widths[0])]
        layout = inductor.fixed_layout(inputs[0].get_device(), torch.float32, one if len(widths) == 1 else [rows * sum(widths)])
        made = inductor.direct_call(call, layout, operands, [rows], [])
        if len(widths) == 1:
            return [made]
        return [
            inductor.as_strided(made, [*lead, width], _strides(lead, width), rows * sum(widths[:k]))
            for k, (lead, width) in enumerate(zip(leads, widths, strict=True))
        ]

    return lower


def _strides(lead: Sequence[Any], width: int) -> list[Any]:
    """Of a contiguous tensor [*lead, width]."""
    return [sympy.Mul(width, *lead[d + 1 :]) for d in range(len(lead))] + [sympy.Integer(1)]


class _Fit:
    """Whether everything that the operator would check at run time is certain already (program_ops.cpp)."""

    def __init__(
        self,
        inductor: Inductor,
        inputs: Sequence[Any],
        packed: Sequence[Any],
        params: Sequence[Any],
        registers: Sequence[int],
        program: Sequence[int],
        constants: Sequence[float],
        outputs: Sequence[int],
    ) -> None:
        self.inductor = inductor
        self.inputs, self.packed, self.params = inputs, packed, params
        self.widths, self.places = registers[::2], registers[1::2]
        self.code = [program[i : i + FIELDS] for i in range(0, len(program), FIELDS)]
        self.constants, self.results, self.likes = constants, outputs[::2], outputs[1::2]

    def holds(self) -> bool:
        tensors = (*self.inputs, *self.packed, *self.params)
        if any(x.get_device().type != "cpu" for x in tensors) or not (self.inputs and self.code and self.results):
            return False
        return self._inputs_fit() and self._registers_fit() and all(map(self._instruction_fits, self.code))

    def _inputs_fit(self) -> bool:
        if any(x.get_dtype() != torch.float32 or len(x.get_size()) < 1 for x in self.inputs):
            return False
        rows = [sympy.Mul(*x.get_size()[:-1]) for x in self.inputs]
        return all(self.inductor.is_equal(rows[0], count) for count in rows)

    def _registers_fit(self) -> bool:
        if len(self.places) != len(self.widths) or any(len(code) != FIELDS for code in self.code):
            return False
        for width, place in zip(self.widths, self.places, strict=True):
            if width < 1 or place >= len(self.inputs):
                return False
            if place >= 0 and not self.inductor.is_equal(self.inputs[place].get_size()[-1], width):
                return False
        if len(set(self.results)) != len(self.results) or len(self.likes) != len(self.results):
            return False
        return all(map(self._is_scratch, self.results)) and all(0 <= like < len(self.inputs) for like in self.likes)

    def _is_register(self, reg: int) -> bool:
        return 0 <= reg < len(self.widths)

    def _is_scratch(self, reg: int) -> bool:
        return self._is_register(reg) and self.places[reg] < 0

    def _instruction_fits(self, code: Sequence[int]) -> bool:
        op, dst, a, b, first, second, third = code
        if not (self._is_scratch(dst) and self._is_register(a) and 0 <= op < len(Op)):
            return False
        n, k = self.widths[dst], self.widths[a]
        if op in (Op.LINEAR, Op.LINEAR_STATIC):
            return self._linear_fits(code, n, k)
        if n != k:
            return False
        if op in (Op.ADD, Op.MUL):
            return self._is_register(b) and self.widths[b] == n
        if op in (Op.ADD_ROW, Op.MUL_ROW):
            return self._is_vector(first, n)
        if op in (Op.LAYER_NORM, Op.RMS_NORM):
            vectors = (first, second) if op == Op.LAYER_NORM else (first,)
            return 0 <= third < len(self.constants) and all(v == -1 or self._is_vector(v, n) for v in vectors)
        return True

    def _linear_fits(self, code: Sequence[int], n: int, k: int) -> bool:
        op, _, _, b, first, second, third = code
        if not 0 <= b < len(self.packed) or third not in WIDTHS or not (first == -1 or self._is_vector(first, n)):
            return False
        if op == Op.LINEAR and second not in WIDTHS:
            return False
        if op == Op.LINEAR_STATIC and not (self._is_vector(second, k) and self._is_vector(second + 1, 1, torch.int32)):
            return False
        sizes = [packed_bytes(n, k, bits, third) for bits in ([second] if op == Op.LINEAR else WIDTHS)]
        blob = self.packed[b]
        return blob.get_dtype() == torch.uint8 and any(self._has_numel(blob, size) for size in sizes)

    def _is_vector(self, index: int, n: int, dtype: torch.dtype = torch.float32) -> bool:
        if not 0 <= index < len(self.params):
            return False
        vector = self.params[index]
        return vector.get_dtype() == dtype and self._has_numel(vector, n)

    def _has_numel(self, value: Any, count: int) -> bool:
        return self.inductor.is_equal(math.prod(value.get_size()), count)
