"""Every private torch name that fxquant uses, so that a torch upgrade fails in one place.

``tests/fxquant/test_compat.py`` imports all of them and keeps one canary a mechanism. Inductor's own names are imported
inside functions: importing Inductor costs a second that ``import fxquant`` must not pay.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import sympy
import torch
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor_tree
from torch.fx.experimental.symbolic_shapes import has_guarding_hint, optimization_hint
from torch.fx.traceback import preserve_node_meta
from torch.utils._pytree import tree_map

from fxquant.errors import UnsupportedTorchError
from fxquant.reach import cell_contents, globals_named

__all__ = [
    "DYNAMO_CONTROL_FLOW",
    "ENTER_AUTOCAST",
    "EXIT_AUTOCAST",
    "FakeTensor",
    "FakeTensorMode",
    "Inductor",
    "TracingContext",
    "check_torch",
    "compile_fx",
    "constant_source",
    "frame_fields",
    "frame_values",
    "get_proxy_mode",
    "inductor_modes",
    "is_called_by_user_code",
    "is_higher_order",
    "make_fx",
    "make_salt_pass",
    "maybe_fake_mode",
    "preserve_node_meta",
    "size_hint",
    "track_tensor_tree",
    "tree_map",
    "user_post_grad_passes",
    "vector_isa",
]

SUPPORTED_TORCH = ("2.13",)

# The calls that Dynamo writes around an autocast region.
ENTER_AUTOCAST, EXIT_AUTOCAST = _enter_autocast, _exit_autocast

# Exceptions by which Dynamo steers itself; they must pass through a backend untouched.
DYNAMO_CONTROL_FLOW = (RestartAnalysis, SkipFrame)


def maybe_fake_mode(values: Sequence[Any]) -> AbstractContextManager[Any]:
    """The fake mode of some fake tensors as a context, or one that does nothing for real tensors."""
    return detect_fake_mode(list(values)) or nullcontext()


def compile_fx(gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor's compile of a Dynamo graph under config patches of this one compilation."""
    from torch._inductor.compile_fx import compile_fx as inductor

    compiled: Any = inductor(gm, list(inputs), config_patches=patches)
    return cast(Callable[..., Any], compiled)


def check_torch(go_on: bool) -> None:
    """Raise UnsupportedTorchError for a torch release that was never tested, unless the user says to go on."""
    release = ".".join(torch.__version__.split(".")[:2])
    if release not in SUPPORTED_TORCH and not go_on:
        raise UnsupportedTorchError(
            f"torch {torch.__version__} is not supported; supported: {', '.join(SUPPORTED_TORCH)}. "
            "The option try_unsupported_torch=True goes on all the same"
        )


def frame_fields() -> dict[str, Any]:
    """co_name, co_filename and co_firstlineno of the function that Dynamo is compiling."""
    context = TracingContext.try_get()
    shape_env = context.fake_mode.shape_env if context is not None and context.fake_mode is not None else None
    fields = getattr(shape_env, "co_fields", None) or {}
    unknown = {"co_name": "graph", "co_filename": "unknown", "co_firstlineno": 0}
    return {**unknown, **fields}


def size_hint(size: int | torch.SymInt) -> int | None:
    """A size of the call that is being compiled, without a guard on it; None where only the data decide it."""
    return int(optimization_hint(size)) if has_guarding_hint(size) else None


def frame_values() -> tuple[Any, ...]:
    """What the frame that Dynamo is compiling can reach at first hand: its locals, closure and the globals it names."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame: Any = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:  # nothing is being compiled
        return ()
    held = globals_named(frame.f_code, frame.f_globals)
    return (*frame.f_locals.values(), *cell_contents(frame.closure), *held)


def is_called_by_user_code() -> bool:
    """Whether the frame that Dynamo is compiling is called by a Python function inside the compiled one.

    Dynamo then met a graph break before any tensor operation of the outer function, and this is only a part of it.
    """
    frame, root, found_user = inspect.currentframe(), str(Path(torch.__file__).parent), False
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if name == "compile_wrapper" and file.endswith("eval_frame.py"):
            return found_user
        is_dynamo = file.endswith("convert_frame.py")  # what lies before it is the compiler, not the program
        found_user = not is_dynamo and (found_user or not file.startswith(root))
        frame = frame.f_back
    return False


def user_post_grad_passes(patches: dict[str, Any]) -> list[Any]:
    """The user's own custom passes, which run before our salt: those of ``patches``, else those set in Inductor."""
    import torch._inductor.config as inductor_config
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    chosen = patches.get("post_grad_custom_pre_pass", inductor_config.post_grad_custom_pre_pass)
    return list(get_custom_graph_passes(chosen))


def make_salt_pass(value: str) -> Any:
    """A pass that does nothing but put ``value`` into the FX-graph and AOTAutograd cache keys."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Salt(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            """Leave the graph as it is."""

        def uuid(self) -> str:
            return value

    return Salt()


def vector_isa() -> str:
    """The vectors that Inductor writes C++ for, of which its cache keys know nothing; empty where it writes none."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return str(pick_vec_isa() or "")


def inductor_modes() -> dict[str, dict[str, Any]]:
    """``mode=`` of torch.compile → the Inductor config patches that it stands for."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options())


def constant_source(name: str) -> Any:
    """The source object that AOTAutograd expects for a parameter held by the graph module itself."""
    from torch._dynamo.source import ConstantSource

    return ConstantSource(name)


def is_higher_order(target: object) -> bool:
    """Whether a call target is a higher-order operator (cond, flex attention, checkpoint, autograd.Function)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


@dataclass(frozen=True)
class Inductor:
    """The parts of Inductor that a lowering uses; made once, when the first lowering registers."""

    CppTemplate: Any
    ops: Any
    register_lowering: Callable[..., Any]
    fallback_handler: Callable[..., Any]
    view: Callable[..., Any]
    permute: Callable[..., Any]
    as_strided: Callable[..., Any]
    direct_call: Callable[..., Any]
    gen_2d_view: Callable[..., Any]
    export_declaration: Callable[[], str]
    threads: Callable[[], int]
    _kernel: Any
    _kernel_name: Any
    _ir: Any
    _virtualized: Any

    @classmethod
    def load(cls) -> "Inductor":
        """Import Inductor's names; this is where a torch upgrade would fail."""
        from torch._inductor import ir, lowering
        from torch._inductor.codegen.cpp import get_export_declaration
        from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
        from torch._inductor.codegen.cpp_template import CppTemplate
        from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
        from torch._inductor.utils import Placeholder, parallel_num_threads
        from torch._inductor.virtualized import V, ops

        return cls(
            CppTemplate=CppTemplate,
            ops=ops,
            register_lowering=lowering.register_lowering,
            fallback_handler=lowering.fallback_handler,
            view=lowering.view,
            permute=lowering.permute,
            as_strided=lowering.as_strided,
            direct_call=_direct_call(ir, V, get_export_declaration, Placeholder.KERNEL_NAME),
            gen_2d_view=gen_2d_view_of_epilogue_buf,
            export_declaration=get_export_declaration,
            threads=parallel_num_threads,
            _kernel=CppTemplateKernel,
            _kernel_name=Placeholder.KERNEL_NAME,
            _ir=ir,
            _virtualized=V,
        )

    def template_output(self, template: Any) -> Any:
        """The output of a template, without the trial rendering that autotuning would need."""

        def make_kernel_render(node: Any, flag_template_buffer_has_other_users: bool, epilogue_nodes: Any = None) -> Any:
            kernel = self._kernel(kernel_name=str(self._kernel_name), num_threads=template.num_threads)
            users = flag_template_buffer_has_other_users
            return kernel, lambda: kernel.render(
                template,
                template_buffer_node=node,
                flag_template_buffer_has_other_users=users,
                epilogue_nodes=epilogue_nodes,
            )

        buffer = self._ir.CppTemplateBuffer(template.layout, template.input_nodes, make_kernel_render, template, None)
        return self._ir.TensorBox.create(buffer)

    def profile_line(self, kernel: Any, title: str) -> str:
        """The line that makes a template's kernel appear in profiles under ``title``; empty where nobody profiles."""
        return str(kernel.maybe_codegen_profile()).replace(str(self._kernel_name), title)

    def is_equal(self, a: Any, b: Any) -> bool:
        """Whether two sizes are equal whatever the symbols in them are."""
        return bool(self.graph().sizevars.statically_known_equals(a, b))

    def is_positive(self, a: Any) -> bool:
        """Whether a size is at least 1 whatever the symbols in it are."""
        return bool(self.graph().sizevars.statically_known_geq(a, 1))

    def graph(self) -> Any:
        """The graph that is being lowered."""
        return self._virtualized.graph

    def realize(self, node: Any) -> Any:
        """A node as a buffer in memory."""
        return self._ir.ExternKernel.realize_input(node)

    def realize_dense_rows(self, node: Any) -> Any:
        """A node in memory with any strides, but the values of a row side by side."""
        made = self._ir.ExternKernel.realize_input(node)
        if self._ir.is_storage_and_layout(made):
            self._ir.as_storage_and_layout(made, freeze=True)
            sizes, strides = made.get_size(), made.get_stride()
            if self.is_equal(sizes[-1], 1) or self.is_equal(strides[-1], 1):
                return made
        return self.realize_contiguous(node)

    def realize_contiguous(self, node: Any) -> Any:
        """A node as a contiguous buffer in memory."""
        return self._ir.ExternKernel.require_contiguous(self._ir.ExternKernel.realize_input(node))

    def fixed_layout(self, device: Any, dtype: torch.dtype, size: list[Any]) -> Any:
        """A contiguous layout."""
        return self._ir.FixedLayout(device, dtype, size)

    def buffer(self, name: str, layout: Any) -> Any:
        """A buffer that stands for a value inside a template."""
        return self._ir.Buffer(name=name, layout=layout)

    def pointwise(self, like: Any, inner: Callable[[Any], Any]) -> Any:
        """A new value with the sizes of ``like``, computed element by element."""
        return self._ir.Pointwise.create(
            device=like.get_device(), dtype=like.get_dtype(), inner_fn=inner, ranges=like.get_size()
        )

    def pointwise_buffer(self, out: Any, inner: Callable[[Any], Any]) -> Any:
        """The buffer ``out`` computed element by element."""
        data = self._ir.Pointwise(device=out.get_device(), dtype=out.get_dtype(), inner_fn=inner, ranges=out.get_size())
        return self._ir.ComputedBuffer(name=out.get_name(), layout=out.layout, data=data)


def _direct_call(ir: Any, virtualized: Any, export_declaration: Callable[[], str], placeholder: Any) -> Callable[..., Any]:
    """``(call, layout, operands, numbers, factors) → value``: a buffer that a call of a library function fills."""
    from torch._inductor import config

    class Node(ir.ExternKernelOut):  # type: ignore[misc]
        def __init__(self, call: Any, layout: Any, operands: list[Any], numbers: list[Any], factors: list[float]) -> None:
            self.call = call  # before the base class, which registers the node
            self.factors = factors
            super().__init__(layout=layout, inputs=operands, constant_args=tuple(numbers))

        def codegen(self, wrapper: Any) -> None:
            """Define the kernel where no call has done so yet, and call it."""
            self.codegen_comment(wrapper)
            names = [*(x.get_name() for x in self.inputs), self.get_name()]
            offsets = [*(x.get_layout().offset for x in self.inputs), 0]
            numbers = [wrapper.codegen_sizevar(sympy.sympify(n)) for n in (*offsets, *self.constant_args)]
            arguments = [*names, *numbers, *map(repr, self.factors)]
            kernel = self._define(wrapper)
            wrapper.generate_kernel_call(kernel, arguments, triton=False, arg_types=self.call.arg_types())

        def _define(self, wrapper: Any) -> str:
            graph, function = virtualized.graph, self.call.function
            profile = ("", "")
            if config.cpp.enable_kernel_profile:
                handle = "torch::aot_inductor::RAIIAtenRecordFunctionHandle"
                line = f'{handle} record_{function}_("graph_{graph.graph_id}_{function}", nullptr);'
                profile = ("#include <torch/csrc/inductor/aoti_runtime/utils.h>\n", line)
            source = self.call.source(str(placeholder), export_declaration(), profile)
            if source not in wrapper.src_to_kernel:
                name = f"cpp_{function}_{wrapper.next_kernel_suffix()}"
                wrapper.src_to_kernel[source] = name
                code = source.replace(str(placeholder), name if graph.cpp_wrapper else "kernel")
                start = code.rfind('extern "C"')
                definition = code[start : code.find(")", start) + 1] + ";\n"
                body = code if graph.cpp_wrapper else f"async_compile.cpp_pybinding({self.call.arg_types()!r}, r'''\n{code}''')"
                wrapper.define_kernel(name, body, gpu=False, cpp_definition=definition)
            return str(wrapper.src_to_kernel[source])

    def make(call: Any, layout: Any, operands: list[Any], numbers: list[Any], factors: list[float]) -> Any:
        return ir.TensorBox.create(Node(call, layout, operands, numbers, factors))

    return make
