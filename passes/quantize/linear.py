"""linear(x, W, b)  →  linear(fake_quant(x), fake_quant(W), b)

Activations are coded per token with scales found at run time (not at all with ``a16``), weights per output channel or
per group of input features. What this leaves is a float graph that anyone can run: the specification of the integer kernel.

Static activations are coded with the steps s of a calibration, one an input channel, and the weight times them::

    linear(x, W, b)  →  linear(fake_quant_static(x, s, zero_point), fake_quant(W·s) / s, b)

What a calibration moves from the input into the weight comes first (``calibration.site.Migration``)::

    linear(x, W, b)  →  linear((x - shift) / factor, W·factor, b + W·shift)

A weight that a calibration rounded stands as its value in the place of fake_quant(W). All vectors are graph inputs: layers
that share a graph may differ in them.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, fx

from fxquant._compat import FakeTensorMode
from fxquant.binding import Slot, add_input
from fxquant.calibration.site import StaticCoding
from fxquant.format_schemes import FormatScheme
from fxquant.passes.quantize.inline import inline
from fxquant.reference import MAX_K
from fxquant.schemes import Scheme

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def conditions(x: fx.Node, weight: fx.Node) -> Iterator[tuple[str, bool]]:
    """(sentence, whether it holds) for a linear's operands; the first false one is what the report says."""
    x_val, w_val = x.meta["val"], weight.meta["val"]
    yield (
        "the weight must be a Parameter or be computed from Parameters alone",
        bool(weight.meta.get("fxquant_frozen", False)),
    )
    yield "the weight must be a matrix", w_val.dim() == 2
    yield "input and weight must be float32, bfloat16 or float16", x_val.dtype in FLOATS and w_val.dtype in FLOATS
    yield "only CPU has integer kernels yet", x_val.device.type == "cpu"
    yield "the weight must have rows and columns", all(isinstance(s, int) and s > 0 for s in w_val.shape)
    yield "the batch must not be empty", not any(isinstance(s, int) and s == 0 for s in x_val.shape)
    yield f"at most {MAX_K} input features keep the int32 sums exact", int(w_val.shape[1]) <= MAX_K


Inputs = Mapping[str, fx.Node]  # of a slot, by name


def add_slot_inputs(graph: fx.Graph, slots: Iterable[Slot], fake_mode: FakeTensorMode) -> dict[Slot, Inputs]:
    """Graph inputs for the vectors of every slot: steps, zero points, factors, shifts, qparams of number formats."""
    made: dict[Slot, Inputs] = {}
    for slot in slots:
        if slot.inputs and slot not in made:
            values = slot.inputs.items()
            made[slot] = {name: add_input(graph, f"{name}_{len(made)}", value, fake_mode) for name, value in values}
    return made


def quantize_linear(node: fx.Node, slot: Slot, inputs: Inputs, fake_mode: FakeTensorMode) -> fx.Node:
    """Insert the fake-quant nodes; returns the linear that now works on float32 fake-quantized operands.

    A site in half precision is computed in float32 and cast back, as the kernel does. ``inputs`` are those of the slot.
    Without a scheme the linear stays as it is.
    """
    scheme = slot.scheme
    if scheme is None:
        return node
    x, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    out_dtype = node.meta["val"].dtype
    with node.graph.inserting_before(node):
        x, weight = _cast(x, torch.float32, fake_mode), _cast(weight, torch.float32, fake_mode)
        bias = _cast(bias, torch.float32, fake_mode) if isinstance(bias, fx.Node) else None
        if "shift" in inputs:
            correction = _call(aten.mv.default, (weight, inputs["shift"]), node, fake_mode)
            bias = correction if bias is None else _call(aten.add.Tensor, (bias, correction), node, fake_mode)
            x = _call(aten.sub.Tensor, (x, inputs["shift"]), node, fake_mode)
        if "factor" in inputs:
            x = _call(aten.div.Tensor, (x, inputs["factor"]), node, fake_mode)
            weight = _call(aten.mul.Tensor, (weight, inputs["factor"]), node, fake_mode)
        if isinstance(scheme, FormatScheme):
            x, weight = _by_format(x, weight, slot, scheme, inputs, node, fake_mode)
        elif isinstance(slot.static, StaticCoding):
            x, weight = _coded(x, slot.static, inputs, node, fake_mode), _fake_quant_weight(weight, scheme, node, fake_mode)
        elif scheme.static:
            x, weight = _fake_quant_static(x, weight, (inputs["steps"], inputs["zero_point"]), scheme, node, fake_mode)
        else:
            x, weight = _fake_quant(x, weight, scheme, node, fake_mode)
        if slot.codes is not None:
            shape_only = torch.empty(1).expand(slot.codes.codes.shape)  # fuse puts the packed weight in its place
            weight = add_input(node.graph, f"rounded_{node.name}", shape_only, fake_mode)
            weight.meta["fxquant_rounded"] = True
        linear = _call(aten.linear.default, (x, weight, bias), node, fake_mode)
        if "shift" in inputs:
            linear.meta["fxquant_correction"] = correction
        result = _cast(linear, out_dtype, fake_mode)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return linear


def _by_format(
    x: fx.Node, weight: fx.Node, slot: Slot, scheme: FormatScheme, inputs: Inputs, before: fx.Node, fake_mode: FakeTensorMode
) -> tuple[fx.Node, fx.Node]:
    """Both operands in the number formats of a scheme; a calibration may give the input another coding, with its qparams."""
    weight = inline(scheme.weight.fake_quant, [weight], before, fake_mode)
    if isinstance(slot.static, StaticCoding):
        return _coded(x, slot.static, inputs, before, fake_mode), weight
    return (x if scheme.activation is None else inline(scheme.activation.fake_quant, [x], before, fake_mode)), weight


def _coded(x: fx.Node, static: StaticCoding, inputs: Inputs, before: fx.Node, fake_mode: FakeTensorMode) -> fx.Node:
    """An input in the number format of a calibration, in plain operators."""
    coding, names = static.coding, list(static.inputs)

    def coded(value: Tensor, *qparams: Tensor) -> Tensor:
        return coding.fake_quant(value, dict(zip(names, qparams, strict=True)))

    return inline(coded, [x, *(inputs[f"coding_{name}"] for name in names)], before, fake_mode)


def _fake_quant(
    x: fx.Node, weight: fx.Node, scheme: Scheme, like: fx.Node, fake_mode: FakeTensorMode
) -> tuple[fx.Node, fx.Node]:
    fxq = torch.ops.fxquant
    if not scheme.is_weight_only:
        x = _call(fxq.fake_quant_per_token.default, (x, scheme.act_bits), like, fake_mode)
    return x, _fake_quant_weight(weight, scheme, like, fake_mode)


def _fake_quant_weight(weight: fx.Node, scheme: Scheme, like: fx.Node, fake_mode: FakeTensorMode) -> fx.Node:
    fxq = torch.ops.fxquant
    if scheme.group:
        return _call(fxq.fake_quant_per_group.default, (weight, scheme.weight_bits, scheme.group), like, fake_mode)
    return _call(fxq.fake_quant_per_channel.default, (weight, scheme.weight_bits), like, fake_mode)


def _fake_quant_static(
    x: fx.Node, weight: fx.Node, static: tuple[fx.Node, fx.Node], scheme: Scheme, like: fx.Node, fake_mode: FakeTensorMode
) -> tuple[fx.Node, fx.Node]:
    fxq, (steps, zero_point) = torch.ops.fxquant, static
    x = _call(fxq.fake_quant_static.default, (x, steps, zero_point, scheme.act_bits), like, fake_mode)
    scaled = _call(aten.mul.Tensor, (weight, steps), like, fake_mode)
    rounded = _call(fxq.fake_quant_per_channel.default, (scaled, scheme.weight_bits), like, fake_mode)
    return x, _call(aten.div.Tensor, (rounded, steps), like, fake_mode)


def _cast(node: fx.Node, dtype: torch.dtype, fake_mode: FakeTensorMode) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    cast = _call(aten.to.dtype, (node, dtype), node, fake_mode)
    cast.meta["fxquant_frozen"] = node.meta.get("fxquant_frozen", False)
    return cast


def _call(target: torch._ops.OpOverload, args: tuple[object, ...], like: fx.Node, fake_mode: FakeTensorMode) -> fx.Node:
    made = like.graph.call_function(target, args)  # type: ignore[arg-type]
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    with fake_mode, torch.no_grad(), torch.autocast("cpu", enabled=False):
        value = target(*values)
    made.meta = {**like.meta, "val": value}
    return made
