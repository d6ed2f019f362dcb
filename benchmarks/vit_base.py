"""ViT-B/16 against its peers: ``python benchmarks/vit_base.py [--isa avx2] [--out FOLDER] [--only NAME ...]``.

Random weights of a fixed seed on noise: the times are those of a real ViT-B/16, the cosines say little about one.
"""

from functools import partial
from typing import Any

from models import Case, Model, main

SIZE, SEED = 224, 0
PEERS = (
    "fxquant auto",
    "fxquant w8a7",
    "fxquant w6a6",
    "eager",
    "inductor",
    "inductor, freezing",
    "onnxruntime fp32",
    "onnxruntime int8",
    "openvino fp32",
    "openvino int8",
    "torchao int8",
)
FEWER = tuple(name for name in PEERS if name not in ("openvino int8", "torchao int8"))


def load() -> Any:
    """transformers' ViTModel of the base size, freshly initialized."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(SEED)
    return ViTModel(ViTConfig(), add_pooling_layer=False).eval()


def case(batch: int) -> Case:
    """Gaussian pixels [batch, 3, SIZE, SIZE]."""
    import torch

    return Case({"pixel_values": torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED))}, [])


MODEL = Model(
    stem="vit-base",
    title="ViT-B/16, random weights",
    load=load,
    shapes={f"{b} x {SIZE} px": partial(case, b) for b in (1,)},
    peers=FEWER,
    protocol=f"weights and pixels random, seed {SEED}",
)

if __name__ == "__main__":
    main(MODEL)
