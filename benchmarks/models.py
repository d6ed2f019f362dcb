"""A real model against its peers: what ``minilm.py``, ``vit_small.py`` and ``vit_base.py`` have in common.

``--isa avx2`` starts a child process in which fxquant, torch, oneDNN, MKL, Inductor's compiler and the C library are told
to stay with AVX2. ONNX Runtime and OpenVINO have no such switch (NumPy, which quantizes for the former, is treated alike):
``cpuid.py`` answers in place of the CPU when they ask what it can do. What was replaced is printed, and a library that was
not held is named.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpuid

AVX2 = {
    # A cache of its own: Inductor would run code that it wrote for AVX2 with AVX-512, and the other way round.
    "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"inductor-avx2-{os.getuid()}"),
    "FXQUANT_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW",
}
NO_SWITCH = ("onnxruntime", "openvino", "numpy")
BASELINE = "inductor"  # of every ratio: measured even where --only does not name it
SITE = Path(sysconfig.get_paths()["purelib"])
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One shape: the timed input, and inputs of the same shape for peers that calibrate, none of which is the timed one."""

    inputs: Inputs
    calibration: list[Inputs]


@dataclass(frozen=True)
class Model:
    """A model, its shapes (words after which ``--shapes`` picks) and the peers that run it."""

    stem: str
    title: str
    load: Callable[[], Any]
    shapes: Mapping[str, Callable[[], Case]]
    peers: tuple[str, ...]
    protocol: str


def main(model: Model) -> None:
    """Measure, print the tables, write the plot and every sample."""
    options = parse(model)
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        with tempfile.TemporaryDirectory() as folder:
            variables = {**os.environ, **AVX2, **without_switch(Path(folder))}
            sys.exit(subprocess.call([sys.executable, *sys.argv], env=variables))
    prepare(options)
    if options.profile:
        from profiles import show_profiles

        with_no_grad(show_profiles, model, options)
    else:
        with_no_grad(run, model, options)


def parse(model: Model) -> argparse.Namespace:
    """The options that every model has."""
    parser = argparse.ArgumentParser(description=f"{model.title} against its peers.")
    parser.add_argument("--isa", choices=["avx2"], help="hold every runner to AVX2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="no new round of a shape after this long")
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=model.peers, help=f"any of: {', '.join(model.peers)}")
    parser.add_argument("--shapes", nargs="*", metavar="SHAPE", choices=model.shapes, help=f"of: {', '.join(model.shapes)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", nargs="+", metavar="SCHEME", help="only print where the time goes, kernel by kernel")
    options = parser.parse_args()
    options.shapes = options.shapes or list(model.shapes)
    return options


def prepare(options: argparse.Namespace) -> None:
    """Threads, warnings and Inductor's vector width, for the whole process."""
    warnings.filterwarnings("ignore")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if options.isa:
        import torch._inductor.config as inductor_config

        inductor_config.cpp.simdlen = 256  # type: ignore[attr-defined]
    torch.set_num_threads(options.threads)


def with_no_grad(call: Callable[..., None], *args: Any) -> None:
    """Run ``call`` without gradients."""
    import torch

    with torch.no_grad():
        call(*args)


def run(model: Model, options: argparse.Namespace) -> None:
    """All shapes in this process."""
    start = time.monotonic()
    import torch
    from harness import machine, plot, save, show, table

    from fxquant.lowering.isa import current_isa

    module = model.load()
    info = {**machine(current_isa()), "protocol": model.protocol}
    groups, seen = {}, []
    for title in options.shapes:
        torch._dynamo.reset()
        groups[title] = compare(module, model, title, options)
        seen.append(cpuid.used_avx512(start))
    print(", ".join(f"{key}: {value}" for key, value in info.items()))
    for title, rows in groups.items():
        show(f"\n{model.title}, {title}\n\n{table(rows, BASELINE)}")
    if options.isa:
        print("\n" + "\n".join(limits(seen)))
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"{model.stem}-{info['fxquant instruction set']}"
    save(options.out / f"{stem}.json", info, groups)
    plot(groups, BASELINE, options.out / f"{stem}.png")
    print(f"\nwritten: {options.out / stem}.json and .png")


def compare(module: Any, model: Model, title: str, options: argparse.Namespace) -> list[Any]:
    """Every peer on one shape; a peer that is missing is named and left out."""
    from harness import cosine, measure
    from peers import PEERS

    case = model.shapes[title]()
    exact = module(**case.inputs)[0]
    calls, agreement, first = {}, {}, {}
    for name in model.peers:
        if options.only and name not in (*options.only, BASELINE):
            continue
        start = time.perf_counter()
        try:
            call = PEERS[name](module, case)
            agreement[name] = cosine(call(), exact, case.inputs.get("attention_mask"))
        except Exception as error:  # a peer that cannot be had must not stop the others
            if name == BASELINE:
                raise
            print(f"left out: {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            continue
        first[name] = time.perf_counter() - start
        calls[name] = call
        print(f"{title}: ready: {name} ({first[name]:.1f} s)", file=sys.stderr)
    rows = measure(calls, options.rounds, seconds=options.seconds)
    for name, row in rows.items():
        row.cosine, row.first_call_s = agreement[name], first[name]
    return list(rows.values())


def without_switch(folder: Path) -> dict[str, str]:
    """The variables that hold the libraries without a switch, none where this machine cannot hold them."""
    if why := cpuid.obstacle():
        print(f"{' and '.join(NO_SWITCH)} are not held to AVX2: that {why}", file=sys.stderr)
        return {}
    return cpuid.environment(folder, [path for package in NO_SWITCH for path in cpuid.shared_libraries(package)])


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
