"""The runners of the comparison: each maker gives a call that returns the last hidden state, or raises ImportError."""

import copy
import inspect
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from models import Case
from torch import Tensor, nn

Run = Callable[[], Tensor]
Make = Callable[[nn.Module, Case], Run]


class Positional(nn.Module):
    """The model as named tensors in order → last hidden state, the form that exporters like."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        hidden: Tensor = self.model(**dict(zip(self.names, values, strict=True)))[0]
        return hidden


def eager(model: nn.Module, case: Case) -> Run:
    return lambda: model(**case.inputs)[0]


def inductor(model: nn.Module, case: Case) -> Run:
    compiled = torch.compile(model)
    return lambda: compiled(**case.inputs)[0]


def freezing(model: nn.Module, case: Case) -> Run:
    """Inductor with frozen weights.

    Dynamo reads the setting too, so it must stand globally. Without it in ``options=`` this would be the backend of the row
    ``inductor``, and Dynamo would run the code that it made for that row, which takes the copied weights as inputs.
    """
    import torch._inductor.config as inductor_config

    compiled = torch.compile(copy.deepcopy(model), options={"freezing": True})
    with inductor_config.patch(freezing=True):  # type: ignore[attr-defined]
        compiled(**case.inputs)
    return lambda: compiled(**case.inputs)[0]


def fxquant(options: dict[str, Any]) -> Make:
    def make(model: nn.Module, case: Case) -> Run:
        compiled = torch.compile(model, backend="fxquant", options=options)
        return lambda: compiled(**case.inputs)[0]

    return make


def calibrated(scheme: str, method: str) -> Make:
    def make(model: nn.Module, case: Case) -> Run:
        import fxquant as fxq

        calibration = fxq.calibrate(model, case.calibration, scheme=scheme, method=method)
        return fxquant({"scheme": scheme, "calibration": calibration})(model, case)

    return make


def torchao(model: nn.Module, case: Case) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(quantized)
    return lambda: compiled(**case.inputs)[0]


def used(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """The inputs that an exported model keeps: ``token_type_ids`` are all zero, which is what BERT takes without them."""
    known = inspect.signature(model.forward).parameters
    return [name for name in inputs if name in known and name != "token_type_ids"]


def _export(model: nn.Module, case: Case, folder: Path) -> Path:
    path = folder / "model.onnx"
    names = used(model, case.inputs)
    args = tuple(case.inputs[name] for name in names)
    wrapped = Positional(model, names).eval()
    keywords = {"input_names": names, "output_names": ["hidden"]}
    torch.onnx.export(wrapped, args, str(path), dynamo=True, external_data=False, verbose=False, **keywords)
    return path


def _session(path: Path, case: Case) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {each.name: case.inputs[each.name].numpy() for each in session.get_inputs()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def ort_fp32(model: nn.Module, case: Case) -> Run:
    import onnxruntime  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        return _session(_export(model, case, Path(folder)), case)


def ort_int8(model: nn.Module, case: Case) -> Run:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = _export(model, case, Path(folder))
        quantized = Path(folder) / "int8.onnx"
        quantize_dynamic(str(path), str(quantized), weight_type=QuantType.QInt8, per_channel=True)
        return _session(quantized, case)


def openvino(model: nn.Module, case: Case) -> Run:
    names = used(model, case.inputs)
    return _openvino_run(_openvino_model(model, case, names), case, names)


def openvino_int8(model: nn.Module, case: Case) -> Run:
    """Static int8 by NNCF's post-training quantization.

    NNCF runs in a process of its own: importing it patches torch for good, which the other runners must not meet.
    """
    import openvino as ov

    names = used(model, case.inputs)
    batches = [[inputs[name].numpy() for name in names] for inputs in case.calibration]
    with tempfile.TemporaryDirectory() as folder:
        paths = str(Path(folder) / "float.xml"), str(Path(folder) / "int8.xml")
        ov.save_model(_openvino_model(model, case, names), paths[0], compress_to_fp16=False)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            other.submit(_quantize, *paths, batches).result()
        return _openvino_run(paths[1], case, names)


def _quantize(source: str, target: str, batches: list[Any]) -> None:
    """Quantize a saved OpenVINO model with NNCF's settings for transformers."""
    import nncf
    import openvino as ov

    kind = nncf.ModelType.TRANSFORMER
    made = nncf.quantize(ov.Core().read_model(source), nncf.Dataset(batches), model_type=kind, subset_size=len(batches))
    ov.save_model(made, target)


def _openvino_model(model: nn.Module, case: Case, names: list[str]) -> Any:
    import openvino as ov

    args = tuple(case.inputs[name] for name in names)
    shapes = [tuple(value.shape) for value in args]
    return ov.convert_model(Positional(copy.deepcopy(model), names).eval(), example_input=args, input=shapes)


def _openvino_run(converted: Any, case: Case, names: list[str]) -> Run:
    import openvino as ov

    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.compile_model(converted, "CPU", hints)
    feed = [case.inputs[name].numpy() for name in names]
    return lambda: torch.from_numpy(compiled(feed)[0])


PEERS: dict[str, Make] = {
    "fxquant auto": fxquant({}),
    "fxquant w8a7": fxquant({"scheme": "w8a7"}),
    "fxquant w7a7": fxquant({"scheme": "w7a7"}),
    "fxquant w6a6": fxquant({"scheme": "w6a6"}),
    "fxquant w8a7, minmax": calibrated("w8a7", "minmax"),
    "fxquant w6a6, minmax": calibrated("w6a6", "minmax"),
    "fxquant w6a6, search": calibrated("w6a6", "search"),
    "fxquant auto, ops": fxquant({"codegen": "ops"}),
    "eager": eager,
    "inductor": inductor,
    "inductor, freezing": freezing,
    "onnxruntime fp32": ort_fp32,
    "onnxruntime int8": ort_int8,
    "openvino fp32": openvino,
    "openvino int8": openvino_int8,
    "torchao int8": torchao,
}
