"""The runners of the comparison: each maker gives a call that returns the last hidden state, or raises ImportError."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], Tensor]
Inputs = dict[str, Tensor]


class Encoder(nn.Module):
    """The model as (input_ids, attention_mask) → hidden states, the form that exporters like."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return hidden


def eager(model: nn.Module, inputs: Inputs) -> Run:
    return lambda: model(**inputs)[0]


def inductor(model: nn.Module, inputs: Inputs, **patches: Any) -> Run:
    compiled = torch.compile(model, options=patches or None)
    return lambda: compiled(**inputs)[0]


def freezing(model: nn.Module, inputs: Inputs) -> Run:
    """Inductor with frozen weights. Dynamo reads the setting too, so it must stand globally: ``options=`` is not enough."""
    import torch._inductor.config as inductor_config

    run = inductor(copy.deepcopy(model), inputs)
    with inductor_config.patch(freezing=True):  # type: ignore[attr-defined]
        run()
    return run


def fxquant(options: dict[str, Any]) -> Callable[[nn.Module, Inputs], Run]:
    def make(model: nn.Module, inputs: Inputs) -> Run:
        compiled = torch.compile(model, backend="fxquant", options=options)
        return lambda: compiled(**inputs)[0]

    return make


def torchao(model: nn.Module, inputs: Inputs) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(quantized)
    return lambda: compiled(**inputs)[0]


def _export(model: nn.Module, inputs: Inputs, folder: Path) -> Path:
    path = folder / "model.onnx"
    args = (inputs["input_ids"], inputs["attention_mask"])
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["hidden"]}
    torch.onnx.export(Encoder(model).eval(), args, str(path), dynamo=True, external_data=False, verbose=False, **names)
    return path


def _session(path: Path, inputs: Inputs) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask")}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def ort_fp32(model: nn.Module, inputs: Inputs) -> Run:
    import onnxruntime  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        return _session(_export(model, inputs, Path(folder)), inputs)


def ort_int8(model: nn.Module, inputs: Inputs) -> Run:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = _export(model, inputs, Path(folder))
        quantized = Path(folder) / "int8.onnx"
        quantize_dynamic(str(path), str(quantized), weight_type=QuantType.QInt8, per_channel=True)
        return _session(quantized, inputs)


def openvino(model: nn.Module, inputs: Inputs) -> Run:
    import openvino as ov

    args = (inputs["input_ids"], inputs["attention_mask"])
    converted = ov.convert_model(Encoder(copy.deepcopy(model)).eval(), example_input=args)
    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.compile_model(converted, "CPU", hints)
    feed = [value.numpy() for value in args]
    return lambda: torch.from_numpy(compiled(feed)[0])


PEERS: dict[str, Callable[[nn.Module, Inputs], Run]] = {
    "fxquant auto": fxquant({}),
    "fxquant w8a7": fxquant({"scheme": "w8a7"}),
    "fxquant w7a7": fxquant({"scheme": "w7a7"}),
    "fxquant auto, ops": fxquant({"codegen": "ops"}),
    "eager": eager,
    "inductor": inductor,
    "inductor, freezing": freezing,
    "onnxruntime fp32": ort_fp32,
    "onnxruntime int8": ort_int8,
    "openvino fp32": openvino,
    "torchao int8": torchao,
}
