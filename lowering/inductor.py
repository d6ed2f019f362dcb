"""The low-bit linears inside Inductor: a template around the library's tile kernels, with Inductor's own epilogue.

The generated kernel quantizes the rows, then walks over output tiles: the library writes an L1-sized tile of
dequantized sums, and the loops that Inductor generates add the bias and whatever pointwise work it fused (GELU,
residual, casts) while the tile is hot. Only this file registers with Inductor.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch

from fxquant._compat import Inductor
from fxquant.reference.rows import ERF as GELU_ERF
from fxquant.reference.rows import GELU_END
from fxquant.reference.rows import TANH as GELU_TANH

TILE_ROWS, TILE_COLUMNS = 96, 64  # FXQUANT_TILE_ROWS and FXQUANT_TILE_COLUMNS of linear.h
_DECLARATIONS = Path(__file__).parent / "cpu" / "linear.h"

_SOURCE = r"""
{{template.header().getvalue()}}
{{declarations}}
extern "C" {{export}}
{{kernel.def_kernel(inputs=inputs, outputs={"Y": Y}, aliases=aliases)}}
{
    {{kernel.maybe_codegen_profile()}}
    const int64_t M = {{kernel.size(GemmOut, 0)}};
    constexpr int64_t N = {{N}};
    const int64_t K = fxquant_linear_features(W);  // at run time: linears that differ in it share one compiled kernel
    int64_t tile_rows, tile_columns;
    fxquant_linear_tiles(M, N, {{weight_bits}}, {{act_bits}}, {{threads}}, &tile_rows, &tile_columns);
    const int64_t down = (M + tile_rows - 1) / tile_rows, across = (N + tile_columns - 1) / tile_columns;
    const int64_t rows = std::max<int64_t>(1, std::min<int64_t>(16, M / {{threads}}));
    const std::unique_ptr<uint8_t[]> scratch(
        new uint8_t[fxquant_linear_scratch_bytes(M, K, {{weight_bits}}, {{act_bits}})]);
    #pragma omp parallel num_threads({{threads}})
    {
        {{kernel.define_stack_allocated_buffer("acc", [ROWS, COLUMNS], torch.float)}}
        #pragma omp for schedule(static)
        for (int64_t row = 0; row < M; row += rows) {
{%- if static %}
            fxquant_quantize_rows_static(X, K, row, std::min(row + rows, M), K, {{weight_bits}}, {{act_bits}},
                                         S, Z, scratch.get(), M);
{%- else %}
            fxquant_quantize_rows(
                X, K, row, std::min(row + rows, M), K, {{weight_bits}}, {{act_bits}}, scratch.get(), M);
{%- endif %}
        }
        #pragma omp for schedule(static)
        for (int64_t tile = 0; tile < down * across; tile++) {
            const int64_t m_start = tile / across * tile_rows, m_end = std::min(m_start + tile_rows, M);
            const int64_t n_start = tile % across * tile_columns, n_end = std::min(n_start + tile_columns, N);
            fxquant_linear_tile(scratch.get(), M, W, m_start, m_end, n_start, n_end, acc, {{COLUMNS}});
{%- set tile_Y = kernel.slice_nd(Y_2d, [("m_start", "m_end"), ("n_start", "n_end")]) %}
{%- set tile_acc = kernel.slice_nd(kernel.local_buffers["acc"], [("0", "m_end - m_start"), ("0", "n_end - n_start")]) %}
            {{kernel.store_output(tile_Y, tile_acc, GemmOut, epilogues,
                                  offsets=("m_start", "n_start"), reindexers=reindexers)|indent(12, false)}}
        }
    }
}
"""


@functools.cache
def register() -> None:
    """Teach Inductor the fxquant:: operators. Idempotent: a lowering table entry can be set once only."""
    inductor = Inductor.load()
    template = _template_class(inductor)
    for name in ("linear_dynamic", "linear_static"):
        op = getattr(torch.ops.fxquant, name).default
        inductor.register_lowering(op, type_promotion_kind=None)(_linear(inductor, op, template))
    inductor.register_lowering(torch.ops.fxquant.gelu.default, type_promotion_kind=None)(_gelu(inductor))


def _linear(inductor: Inductor, op: Any, template: Any) -> Callable[..., Any]:
    """The lowering of one linear; ``rest`` are steps and zero point of a static one, then out_features and both widths."""

    def lower(x: Any, packed: Any, bias: Any, *rest: Any) -> Any:
        *static, out_features, weight_bits, act_bits = rest
        if x.get_device().type != "cpu" or inductor.graph().cpp_wrapper:
            return inductor.fallback_handler(op)(x, packed, bias, *rest)
        *lead, k = x.get_size()
        if static and static[0].get_size() != [k]:  # one step for all channels: the operator spreads it
            return inductor.fallback_handler(op)(x, packed, bias, *rest)
        m = sympy.Mul(*lead)
        inputs = {"X": inductor.realize_contiguous(inductor.view(x, [m, k])), "W": inductor.realize(packed)}
        inputs |= {name: inductor.realize_contiguous(value) for name, value in zip("SZ", static, strict=False)}
        if bias is not None:
            inputs["B"] = inductor.realize_contiguous(bias)
        layout = inductor.fixed_layout(x.get_device(), torch.float32, [m, sympy.Integer(out_features)])
        made = template(inputs, layout, weight_bits, act_bits)
        return inductor.view(inductor.template_output(made), [*lead, out_features])

    return lower


def _gelu(inductor: Inductor) -> Callable[..., Any]:
    """The lowering of GELU: reference.rows.gelu, operation for operation."""
    ops = inductor.ops

    def number(value: float) -> Any:
        return ops.constant(value, torch.float32)

    def value(x: Any, coefficients: Sequence[float]) -> Any:
        a = ops.minimum(ops.abs(x), number(GELU_END))
        p = number(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            p = ops.add(ops.mul(p, a), number(c))
        for _ in range(3):
            p = ops.mul(p, p)
        return ops.sub(ops.maximum(x, number(0.0)), ops.mul(a, p))

    def lower(x: Any, tanh: bool) -> Any:
        load = x.make_loader()
        return inductor.pointwise(x, lambda index: value(load(index), GELU_TANH if tanh else GELU_ERF))

    return lower


def _template_class(inductor: Inductor) -> Any:
    """The CppTemplate subclass; made here because Inductor must not be imported before a lowering runs."""

    class LinearTemplate(inductor.CppTemplate):  # type: ignore[misc, name-defined]
        def __init__(self, inputs: dict[str, Any], layout: Any, weight_bits: int, act_bits: int) -> None:
            super().__init__("fxquant_linear", list(inputs.values()), layout, inductor.threads())
            self.names = tuple(inputs)
            self.bits = (weight_bits, act_bits)

        def render(
            self,
            kernel: Any,
            template_buffer_node: Any,
            flag_template_buffer_has_other_users: bool,
            epilogue_nodes: list[Any] | None,
        ) -> str:
            named = dict(zip(self.names, self.input_nodes, strict=True))
            bias = named.get("B")
            out = template_buffer_node
            gemm_out = inductor.buffer(f"{out.get_name()}_GemmOut", out.layout)
            epilogues = [inductor.pointwise_buffer(out, _bias_add(inductor, gemm_out, bias))]
            reindexers: list[Any] = [None]
            aliases = {gemm_out.get_name()}
            y = y_2d = out
            if epilogue_nodes:
                if not flag_template_buffer_has_other_users:
                    aliases.add(out.get_name())
                epilogues.extend(epilogue_nodes)
                y = epilogue_nodes[-1]
                y_2d, reindexers = inductor.gen_2d_view(y, out, epilogue_nodes, reindexers, [None] * len(epilogue_nodes))
            n = int(out.get_size()[1])
            with patch.object(inductor.graph(), "get_dtype", self._fake_get_dtype(gemm_out)):
                return str(
                    self._template_from_string(_SOURCE).render(
                        template=self,
                        kernel=kernel,
                        declarations=_DECLARATIONS.read_text(),
                        export=inductor.export_declaration(),
                        inputs=named,
                        static="S" in named,
                        Y=y,
                        Y_2d=y_2d,
                        GemmOut=gemm_out,
                        N=n,
                        ROWS=TILE_ROWS,
                        COLUMNS=TILE_COLUMNS,
                        weight_bits=self.bits[0],
                        act_bits=self.bits[1],
                        threads=self.num_threads,
                        torch=torch,
                        epilogues=epilogues,
                        reindexers=reindexers,
                        aliases={alias: y.get_name() for alias in aliases},
                    )
                )

    return LinearTemplate


def _bias_add(inductor: Inductor, source: Any, bias: Any) -> Callable[[Any], Any]:
    """The first epilogue: sums + bias (or a plain copy), in the order of the reference."""

    def inner(index: Any) -> Any:
        value = source.make_loader()(index)
        return value if bias is None else inductor.ops.add(value, bias.make_loader()([index[-1]]))

    return inner
