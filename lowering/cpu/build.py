"""The kernel library: built once a machine, on first use, into a cache keyed by its sources, flags and torch.

``python -m fxquant.lowering.cpu.build`` builds it ahead of time; ``--into FOLDER`` puts it into a wheel.
"""

import argparse
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from fxquant.errors import KernelBuildError

SOURCES = Path(__file__).resolve().parent
DEFAULT_CACHE = Path("~/.cache/fxquant")
_COMMON = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DNDEBUG")
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_TORCH = ("-DTORCH_TARGET_VERSION=0x020d000000000000",)  # a file with operators: torch's stable C++ ABI
# File → what it needs beyond the common flags. Only a path's own file is compiled for its instruction set.
UNITS: dict[str, tuple[str, ...]] = {
    "isa.cpp": (),
    "pack.cpp": (),
    "linear.cpp": (),
    "linear_team.cpp": (),
    "linear_scalar.cpp": (),
    "linear_avx2.cpp": _AVX2,
    "linear_avxvnni.cpp": (*_AVX2, "-mavxvnni"),
    "linear_avx512vnni.cpp": _AVX512,
    "linear_ops.cpp": _TORCH,
    "softmax.cpp": (),
    "softmax_scalar.cpp": (),
    "softmax_avx2.cpp": _AVX2,
    "softmax_avx512.cpp": _AVX512,
    "softmax_ops.cpp": _TORCH,
    "flash_sigmoid.cpp": (),
    "flash_sigmoid_scalar.cpp": (),
    "flash_sigmoid_avx2.cpp": _AVX2,
    "flash_sigmoid_avx512.cpp": _AVX512,
    "flash_sigmoid_ops.cpp": _TORCH,
    "lut.cpp": (),
    "lut_scalar.cpp": (),
    "lut_avx2.cpp": _AVX2,
    "lut_ops.cpp": _TORCH,
    "stream.cpp": (),
    "stream_scalar.cpp": (),
    "stream_avx2.cpp": _AVX2,
    "stream_avx512vnni.cpp": _AVX512,
    "stream_ops.cpp": _TORCH,
    "linear_float.cpp": (),
    "linear_float_avx2.cpp": _AVX2,
    "linear_float_avx512.cpp": _AVX512,
    "linear_float_ops.cpp": _TORCH,
    "attention.cpp": (),
    "attention_scalar.cpp": (),
    "attention_avx2.cpp": _AVX2,
    "attention_avx512.cpp": _AVX512,
    "attention_int.cpp": (),
    "attention_int_scalar.cpp": (),
    "attention_int_avx2.cpp": _AVX2,
    "attention_int_avxvnni.cpp": (*_AVX2, "-mavxvnni"),
    "attention_int_avx512.cpp": _AVX512,
    "attention_log.cpp": (),
    "attention_log_planes.cpp": (),
    "attention_ops.cpp": _TORCH,
    "attention_log_ops.cpp": _TORCH,
    "attention_call.cpp": _TORCH,
    "program.cpp": (),
    "program_scalar.cpp": (),
    "program_avx2.cpp": _AVX2,
    "program_avx512.cpp": _AVX512,
    "program_ops.cpp": _TORCH,
}


def load_library(cache: Path | None = None, isa: int | None = None) -> Path:
    """Load the kernels into this process, building them first where this machine has not yet.

    ``cache`` is the folder for built libraries (default ``~/.cache/fxquant``), ``isa`` the highest instruction set that
    kernels may use.

    Raises:
        KernelBuildError: there is no compiler, the compiler fails, or the folder cannot be written.
    """
    path = library_path(cache)
    library = _load(path)
    library.fxquant_set_isa(ctypes.c_int32(3 if isa is None else isa))
    return path


def library_path(cache: Path | None = None) -> Path:
    """Where the built library is; builds it where it is not there yet."""
    shipped = SOURCES / _file_name()
    if shipped.is_file():
        return shipped
    folder = (cache or DEFAULT_CACHE).expanduser()
    path = folder / _file_name()
    if _is_intact(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "build.lock"):
            if not _is_intact(path):
                build(path)
    except OSError as error:
        raise KernelBuildError(
            f"the kernel library cannot be written to {folder}: {error.strerror or error}; "
            "set FXQUANT_CACHE to a folder that can be written"
        ) from None
    return path


def build(path: Path) -> None:
    """Compile every unit and link them to ``path``, with a progress line on stderr."""
    compiler = find_compiler()
    start = time.perf_counter()
    print("fxquant: building the kernel library (once a machine) ...", end=" ", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as work:
        objects = [Path(work) / f"{unit}.o" for unit in UNITS]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda pair: _compile(compiler, *pair), zip(UNITS, objects, strict=True)))
        linked = Path(work) / path.name
        libraries = Path(torch.__file__).parent / "lib"
        link = ["-shared", "-o", linked, *objects, f"-L{libraries}", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
        _run([compiler, *map(str, link)])
        digest = _digest(linked.read_bytes())
        path.with_suffix(".sha256").write_text(digest)
        linked.replace(path)
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def find_compiler() -> str:
    """The C++ compiler: ``$CXX``, else g++, c++ or clang++ of the path.

    Raises:
        KernelBuildError: there is none.
    """
    wanted = [name for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name]
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise KernelBuildError(
        f"no C++ compiler found (looked for {', '.join(wanted)}): the kernels are compiled once a machine. "
        "Install g++ (Debian: apt-get install g++) or set CXX"
    )


def _compile(compiler: str, unit: str, to: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    _run([compiler, *_COMMON, *UNITS[unit], f"-I{include}", "-c", str(SOURCES / unit), "-o", str(to)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelBuildError(f"the kernel library does not compile:\n{' '.join(command)}\n{done.stderr[-2000:]}")


@functools.cache
def _file_name() -> str:
    """The library's name: a digest of everything that decides its content."""
    parts = [path.name.encode() + path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*"))]
    parts += [repr((UNITS, _COMMON)).encode(), torch.__version__.encode()]
    return f"libfxquant-{_digest(b''.join(parts))[:20]}.so"


def _is_intact(path: Path) -> bool:
    record = path.with_suffix(".sha256")
    try:
        return record.read_text() == _digest(path.read_bytes())
    except OSError:
        return False


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # generated code calls its symbols
        torch.ops.load_library(path)
    except OSError as error:
        raise KernelBuildError(f"the kernel library {path} cannot be loaded: {error}") from None
    return library


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Build ahead of time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, help="folder for the library instead of the cache")
    into = parser.parse_args().into
    if into is not None:
        into.mkdir(parents=True, exist_ok=True)
        build(into.resolve() / _file_name())
        return
    from fxquant.config import environment

    print(load_library(environment().cache))


if __name__ == "__main__":
    main()
