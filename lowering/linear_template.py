"""The linears of fxquant as one Inductor template: the library's tile kernels, with Inductor's epilogue around them.

The generated kernel prepares the rows (quantizes them, as a rule), then walks over output tiles. The library writes a tile
with its bias straight to the result; where Inductor fused pointwise work (GELU, a residual, a cast) the tile goes to a
buffer in cache, over which the loops that Inductor generates run while it is hot. Linears with equal sources share one
compiled kernel.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fxquant._compat import Inductor

_CPU = Path(__file__).parent / "cpu"
TILE_ROWS, TILE_COLUMNS = 96, 64  # FXQUANT_TILE_ROWS and FXQUANT_TILE_COLUMNS of linear.h

_SOURCE = r"""
{{template.header().getvalue()}}
{{declarations}}
extern "C" {{export}}
{{kernel.def_kernel(inputs=inputs, outputs={"Y": Y}, aliases=aliases)}}
{
    {{profile}}
    const int64_t M = {{kernel.size(GemmOut, 0)}};
    constexpr int64_t N = {{N}};
    int64_t workers = {{threads}}, tile_rows, tile_columns;
    {{fill(sizes)}}
    const int64_t down = (M + tile_rows - 1) / tile_rows, across = (N + tile_columns - 1) / tile_columns;
{%- if prepare %}
    const int64_t rows = std::max<int64_t>(1, std::min<int64_t>(16, M / {{threads}}));
    const std::unique_ptr<uint8_t[]> scratch(new uint8_t[{{scratch}}]);
{%- endif %}
    #pragma omp parallel num_threads(workers)
    {
        {{each_thread}}
{%- if epilogue_nodes and small_tile %}
        {{kernel.define_stack_allocated_buffer("acc", small_tile, torch.float)}}
{%- elif epilogue_nodes %}
        {{kernel.define_buffer("acc", ["tile_rows", "tile_columns"], torch.float)}}
{%- endif %}
{%- if prepare %}
        #pragma omp for schedule(static)
        for (int64_t row = 0; row < M; row += rows) {
            const int64_t end = std::min(row + rows, M);
            {{fill(prepare)}}
        }
{%- endif %}
        #pragma omp for schedule(static)
        for (int64_t tile = 0; tile < down * across; tile++) {
            const int64_t m_start = tile / across * tile_rows, m_end = std::min(m_start + tile_rows, M);
            const int64_t n_start = tile % across * tile_columns, n_end = std::min(n_start + tile_columns, N);
{%- if epilogue_nodes %}
            float* const to = acc;
            const int64_t ldo = {{small_tile[1] if small_tile else "tile_columns"}};
            {{fill(tile)}}
{%- set tile_Y = kernel.slice_nd(Y_2d, [("m_start", "m_end"), ("n_start", "n_end")]) %}
{%- set tile_acc = kernel.slice_nd(kernel.local_buffers["acc"], [("0", "m_end - m_start"), ("0", "n_end - n_start")]) %}
            {{kernel.store_output(tile_Y, tile_acc, GemmOut, epilogues,
                                  offsets=("m_start", "n_start"), reindexers=reindexers)|indent(12, false)}}
{%- else %}
            float* const to = Y + m_start * N + n_start;
            const int64_t ldo = N;
            {{fill(tile)}}
{%- endif %}
        }
    }
}
"""


@dataclass(frozen=True)
class LinearShell:
    """What one packed format puts into the template; the texts are C++ with M, N, K and the operands X, W, B, S and Z.

    ``sizes`` sets tile_rows and tile_columns (and may lower workers), ``prepare`` turns rows ``row`` to ``end`` of X into
    ``scratch`` bytes, ``tile`` writes one tile with its bias to ``to`` of row stride ``ldo``. ``title`` names the kernel
    in profiles. ``small_tile`` is the largest tile where that is known and fits a stack.
    """

    title: str
    header: str
    calls: tuple[str, ...]
    sizes: str
    tile: str
    scratch: str = ""
    prepare: str = ""
    each_thread: str = ""
    small_tile: tuple[int, int] | None = None

    def declarations(self) -> str:
        """The C declarations of the library functions that the texts call."""
        return declarations(self.calls)


def declarations(names: tuple[str, ...]) -> str:
    """The declarations of some functions of the library, from its C headers."""
    text = "\n".join(path.read_text() for path in sorted(_CPU.glob("*.h")))
    found = []
    for name in names:
        match = re.search(rf"^FXQUANT_EXPORT ([^;]*\b{name}\([^;]*;)", text, re.MULTILINE)
        if match is None:
            raise LookupError(f"no header of {_CPU} declares {name}")
        found.append(match[1])
    return 'extern "C" {\n' + "\n".join(found) + "\n}"


def panel_shell(k: int, weight_bits: int, act_bits: int, static: bool) -> LinearShell:
    """Low-bit weights in panels; each row is quantized by its own range, or by given steps."""
    bits = f"{weight_bits}, {act_bits}"
    rows, given = ("rows_static", " S, Z,") if static else ("rows", "")
    return LinearShell(
        title=f"linear_{'static' if static else 'dynamic'}_w{weight_bits}a{act_bits}",
        header="linear.h",
        calls=(
            "fxquant_linear_features",
            "fxquant_linear_tiles",
            "fxquant_linear_scratch_bytes",
            f"fxquant_quantize_{rows}",
            "fxquant_linear_bias_tile",
        ),
        # K at run time: linears that differ in it share one compiled kernel
        sizes="const int64_t K = fxquant_linear_features(W);\n"
        f"    fxquant_linear_tiles(M, N, {bits}, workers, &tile_rows, &tile_columns);",
        scratch=f"fxquant_linear_scratch_bytes(M, K, {bits})",
        prepare=f"fxquant_quantize_{rows}(X, K, row, end, K, {bits},{given} scratch.get(), M);",
        tile="fxquant_linear_bias_tile(scratch.get(), M, W, B, m_start, m_end, n_start, n_end, to, ldo);",
        small_tile=(TILE_ROWS, TILE_COLUMNS),
    )


def lut_shell(k: int, act_bits: int) -> LinearShell:
    """2-bit weights by table look-up."""
    return LinearShell(
        title=f"linear_lut_w2a{act_bits}",
        header="lut.h",
        calls=(
            "fxquant_linear_scratch_bytes",
            "fxquant_quantize_rows",
            "fxquant_lut_table_bytes",
            "fxquant_lut_tiles",
            "fxquant_lut_tile",
        ),
        sizes=f"constexpr int64_t K = {k};\n    fxquant_lut_tiles(M, N, workers, &tile_rows, &tile_columns);",
        scratch=f"fxquant_linear_scratch_bytes(M, K, 2, {act_bits})",
        prepare=f"fxquant_quantize_rows(X, K, row, end, K, 2, {act_bits}, scratch.get(), M);",
        each_thread="const std::unique_ptr<uint8_t[]> tables(new uint8_t[fxquant_lut_table_bytes(K)]);",
        tile="""fxquant_lut_tile(scratch.get(), M, W, m_start, m_end, n_start, n_end, tables.get(), to, ldo);
            const float* const bias = B;
            if (bias != nullptr)
                for (int64_t i = 0; i < m_end - m_start; i++)
                    for (int64_t j = 0; j < n_end - n_start; j++) to[i * ldo + j] += bias[n_start + j];""",
    )


def stream_shell(k: int, weight_bits: int, act_bits: int, group: int) -> LinearShell:
    """Weights that are read as one stream; a small one is left to a single thread."""
    return LinearShell(
        title=f"linear_stream_w{weight_bits}a{act_bits}" + (f"g{group}" if group else ""),
        header="stream.h",
        calls=(
            "fxquant_stream_features",
            "fxquant_stream_tiles",
            "fxquant_stream_scratch_bytes",
            "fxquant_stream_prepare",
            "fxquant_stream_run",
        ),
        sizes="const int64_t K = fxquant_stream_features(W);\n"
        "    fxquant_stream_tiles(W, M, &workers, &tile_rows, &tile_columns);",
        scratch="fxquant_stream_scratch_bytes(W, M)",
        prepare="fxquant_stream_prepare(X, K, row, end, M, W, scratch.get());",
        tile="fxquant_stream_run(X, K, scratch.get(), M, W, B, m_start, m_end, n_start, n_end, to, ldo);",
    )


def float_shell(k: int) -> LinearShell:
    """Float weights in panels."""
    return LinearShell(
        title="linear_float",
        header="linear_float.h",
        calls=("fxquant_float_tiles", "fxquant_float_tile"),
        sizes=f"constexpr int64_t K = {k};\n    fxquant_float_tiles(M, N, workers, &tile_rows, &tile_columns);",
        tile="fxquant_float_tile(X, K, W, B, m_start, m_end, n_start, n_end, to, ldo);",
    )


def _pointer(kernel: Any, node: Any) -> str:
    """Where an operand begins, which is inside its buffer for a slice; nullptr without an operand."""
    return "nullptr" if node is None else "&" + str(kernel.index(node, ["0"] * len(node.get_size())))


def template_class(inductor: Inductor) -> Any:
    """The CppTemplate subclass; made here because Inductor must not be imported before a lowering runs."""

    class LinearTemplate(inductor.CppTemplate):  # type: ignore[misc, name-defined]
        def __init__(self, inputs: dict[str, Any], layout: Any, shell: LinearShell) -> None:
            super().__init__("fxquant_linear", list(inputs.values()), layout, inductor.threads())
            self.names = tuple(inputs)
            self.shell = shell

        def render(
            self,
            kernel: Any,
            template_buffer_node: Any,
            flag_template_buffer_has_other_users: bool,
            epilogue_nodes: list[Any] | None,
        ) -> str:
            named = dict(zip(self.names, self.input_nodes, strict=True))
            out, shell = template_buffer_node, self.shell
            gemm_out = inductor.buffer(f"{out.get_name()}_GemmOut", out.layout)
            epilogues = [inductor.pointwise_buffer(out, gemm_out.make_loader())]
            reindexers: list[Any] = [None]
            aliases = {gemm_out.get_name()}
            y = y_2d = out
            if epilogue_nodes:
                if not flag_template_buffer_has_other_users:
                    aliases.add(out.get_name())
                epilogues.extend(epilogue_nodes)
                y = epilogue_nodes[-1]
                y_2d, reindexers = inductor.gen_2d_view(y, out, epilogue_nodes, reindexers, [None] * len(epilogue_nodes))
            n, k = int(out.get_size()[1]), int(named["X"].get_size()[1])

            def fill(text: str) -> str:  # called after def_kernel, which names the buffers
                return re.sub(r"\b[XWBSZ]\b", lambda found: _pointer(kernel, named.get(found[0])), text)

            with patch.object(inductor.graph(), "get_dtype", self._fake_get_dtype(gemm_out)):
                return str(
                    self._template_from_string(_SOURCE).render(
                        template=self,
                        kernel=kernel,
                        profile=inductor.profile_line(kernel, f"{shell.title}_{n}x{k}"),
                        declarations=shell.declarations(),
                        export=inductor.export_declaration(),
                        inputs=named,
                        Y=y,
                        Y_2d=y_2d,
                        GemmOut=gemm_out,
                        N=n,
                        sizes=shell.sizes,
                        scratch=shell.scratch,
                        prepare=shell.prepare,
                        each_thread=shell.each_thread,
                        small_tile=shell.small_tile,
                        tile=shell.tile,
                        fill=fill,
                        threads=self.num_threads,
                        torch=torch,
                        epilogue_nodes=epilogue_nodes,
                        epilogues=epilogues,
                        reindexers=reindexers,
                        aliases={alias: y.get_name() for alias in aliases},
                    )
                )

    return LinearTemplate
