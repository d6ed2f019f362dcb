"""Dynamo's graph → normal form: pre-dispatch ATen in which the operators that rules read stay whole.

``linear``, ``matmul``, ``softmax``, ``layer_norm``, ``gelu`` and ``scaled_dot_product_attention`` are one node each, as
in torch.export, so passes serve both. Weights are placeholders: those that are frozen (Parameters and static buffers
which the graph does not write) and every value computed from them alone carry ``meta["fxquant_frozen"]``.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant._compat import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    FakeTensor,
    FakeTensorMode,
    TracingContext,
    constant_source,
    get_proxy_mode,
    is_higher_order,
    make_fx,
    preserve_node_meta,
    track_tensor_tree,
    tree_map,
)
from fxquant.errors import CaptureError
from fxquant.sites import clean_source
from fxquant.transformer_encoder import encoder_layer_decompositions

# functorch calls that stand around a vmap region; any other functorch transform is not understood.
_VMAP_CALLS = ("lazy_load_decompositions", "_add_batch_dim", "_remove_batch_dim")


@dataclass(frozen=True)
class Captured:
    """A graph in normal form with the fake mode its ``meta["val"]`` belong to."""

    gm: fx.GraphModule
    fake_mode: FakeTensorMode


def compiled_call(model: Callable[..., Any], backend: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """``(args, kwargs) → model(*args, **kwargs)`` through a Dynamo backend; the model's own compiled code is left alone."""
    target = getattr(model, "_orig_mod", model)
    # Dynamo keeps its cache on code objects, so this call gets one of its own.
    call = types.FunctionType(_call.__code__.replace(), _call.__globals__)
    compiled = torch.compile(call, backend=backend)
    return lambda args, kwargs: compiled(target, args, kwargs)


def _call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return target(*args, **kwargs)


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Normal form of a Dynamo graph. Must run inside a Dynamo compile (it needs the tracing context).

    Raises:
        CaptureError: the graph holds something that cannot be copied faithfully; the caller compiles it as float.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise CaptureError("no tracing context: the graph did not come from torch.compile")
    fake_mode = context.fake_mode
    fakes = [_fakify(value, context, fake_mode) for value in example_inputs]
    interpreter = _Normalise(gm, fake_mode)
    with fake_mode, preserve_node_meta():
        normal = make_fx(
            lambda *values: interpreter.run(*values),
            decomposition_table=encoder_layer_decompositions(),
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*fakes)
    _copy_dynamo_metadata(gm, normal)
    remove_dead_code(normal.graph)
    mark_frozen(normal, example_inputs)
    normal.recompile()
    return Captured(normal, fake_mode)


def is_functorch(node: fx.Node) -> bool:
    """Whether a node is one of functorch's own bookkeeping calls, which must never be removed or reordered."""
    return node.op == "call_function" and "functorch" in (getattr(node.target, "__module__", None) or "")


def remove_dead_code(graph: fx.Graph) -> None:
    """Remove what nobody reads, but never functorch's bookkeeping: nobody reads it, and everything depends on it."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or is_functorch(node))


def mark_frozen(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Set ``meta["fxquant_frozen"]`` on every value that depends on frozen inputs and constants alone.

    An input is frozen when it is a Parameter or a static buffer and no operator writes to it or to a view of it.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    written = _written_placeholders(gm.graph)
    for node, value in zip(placeholders, example_inputs, strict=True):
        node.meta["fxquant_frozen"] = node not in written and _is_static(node, value)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            node.meta["fxquant_frozen"] = True
        elif node.op == "call_function":
            node.meta["fxquant_frozen"] = _is_pure(node) and all(
                source.meta.get("fxquant_frozen", False) for source in node.all_input_nodes
            )


def _is_static(node: fx.Node, value: object) -> bool:
    if not isinstance(value, Tensor):
        return False
    marked = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    return isinstance(value, torch.nn.Parameter) or marked


def _is_pure(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return bool(node.all_input_nodes) and not random and not node.target._schema.is_mutable


def _written_placeholders(graph: fx.Graph) -> set[fx.Node]:
    """Inputs that some operator may write to, directly or through a view; conservative: every ancestor counts."""
    written: set[fx.Node] = set()
    pending = [node for node in graph.nodes if _writes(node)]
    starts = {source for node in pending for source in node.all_input_nodes}
    seen = set(starts)
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            written.add(node)
        elif _may_be_view(node):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
    return written


def _writes(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return is_higher_order(node.target)


def _may_be_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return True
    # Composite operators such as reshape or contiguous may return their input; only a fresh-output schema is safe.
    schema = node.target._schema
    aliases = any(result.alias_info is not None for result in schema.returns)
    return aliases or node.target.namespace != "aten" or node.target.overloadpacket.__name__ in _MAYBE_VIEWS


_MAYBE_VIEWS = ("reshape", "contiguous", "to", "flatten", "type_as", "dropout", "ravel", "_to_copy", "reshape_as")


def _fakify(value: Any, context: TracingContext, fake_mode: FakeTensorMode) -> Any:
    if not isinstance(value, Tensor):
        return value
    symbolic = context.tensor_to_context.get(value)
    source = symbolic.tensor_source if symbolic else None
    return fake_mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=False)


def _copy_dynamo_metadata(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """What AOTAutograd reads from Dynamo's graphs: without it no input counts as static."""
    new.meta["dynamo_compile_id"] = old.meta.get("dynamo_compile_id")
    held = [*new.named_parameters(), *new.named_buffers()]
    new._param_name_to_source = {name: constant_source(name) for name, _ in held}  # type: ignore[assignment]
    pairs = zip(old.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"), strict=True)
    for source, node in pairs:
        origin = getattr(source, "_dynamo_source", None)
        node._dynamo_source = origin
        if "tensor_dict" in source.meta:
            node.meta["tensor_dict"] = source.meta["tensor_dict"]
        node.meta["fxquant_name"] = clean_source(_source_name(origin)) if origin is not None else str(source.target)


def _source_name(source: Any) -> str:
    name = source.name
    return str(name() if callable(name) else name)


class _Normalise(fx.Interpreter):
    """Runs a Dynamo graph under make_fx. Higher-order operators and vmap regions are copied, never traced through:

    tracing through them would bake intermediate values in as constants and drop custom gradients.
    """

    def __init__(self, gm: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.fake_mode = fake_mode
        self.extra_traceback = False
        self.vmap_depth = 0
        self.autocasts: dict[fx.Node, torch.autocast] = {}

    def run_node(self, n: fx.Node) -> Any:
        if is_functorch(n):
            return self._run_functorch(n)
        if self.vmap_depth and n.op.startswith("call_"):
            return self._copy(n, track=False)
        if n.op == "call_function" and is_higher_order(n.target):
            return self._copy(n, track=True)
        result = super().run_node(n)
        self._follow_autocast(n)
        return result

    def _follow_autocast(self, node: fx.Node) -> None:
        """Tracing records the calls around an autocast region; entering it for real gives the values in it their dtypes."""
        if node.target is ENTER_AUTOCAST:
            device, dtype, enabled, _ = node.args
            self.autocasts[node] = torch.autocast(device, dtype, enabled, cache_enabled=False)  # type: ignore[arg-type]
            self.autocasts[node].__enter__()
        elif node.target is EXIT_AUTOCAST:
            (entered,) = node.all_input_nodes
            self.autocasts.pop(entered).__exit__(None, None, None)

    def _run_functorch(self, node: fx.Node) -> Any:
        name = getattr(node.target, "__name__", str(node.target))
        if "vmap" not in name and name not in _VMAP_CALLS:
            raise CaptureError(f"the functorch transform {name} is not understood")
        self.vmap_depth += (name == "_vmap_increment_nesting") - (name == "_vmap_decrement_nesting")
        return self._copy(node, track=name == "_remove_batch_dim" and self.vmap_depth == 1)

    def _copy(self, node: fx.Node, *, track: bool) -> Any:
        mode = get_proxy_mode()
        if mode is None:
            raise CaptureError("no proxy mode while copying a higher-order operator")
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        unwrap = self._unwrapper(node, mode)
        proxy_args, proxy_kwargs = tree_map(unwrap, (args, kwargs))
        proxy = mode.tracer.create_proxy(node.op, node.target, proxy_args, proxy_kwargs)
        if not track:
            return proxy
        value = tree_map(self._refake, node.meta["example_value"])
        return track_tensor_tree(value, proxy, constant=None, tracer=mode.tracer)

    def _unwrapper(self, node: fx.Node, mode: Any) -> Callable[[Any], Any]:
        def unwrap(value: Any) -> Any:
            if isinstance(value, fx.Proxy):
                return value
            if not isinstance(value, torch.nn.Module):
                return mode.tracer.unwrap_proxy(value)
            held = (arg.target for arg in node.all_input_nodes if arg.op == "get_attr")
            name = next(str(target) for target in held if self.submodules.get(str(target)) is value)
            if not hasattr(mode.tracer.root, name):
                mode.tracer.root.register_module(name, value)
            return mode.tracer.create_proxy("get_attr", name, (), {})

        return unwrap

    def _refake(self, value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        with self.fake_mode:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return fake.requires_grad_(value.requires_grad and value.is_floating_point())
