"""The benchmarks' answers to CPUID: a small library with a CPUID of its own, loaded with and without them."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parents[1] / "benchmarks" / "cpuid.py"
LIBRARY = r"""
#include <cpuid.h>
static unsigned early[4];
unsigned bytes = 0x90a20f90; /* the bytes of CPUID as data and inside an instruction: both must stay */
unsigned inside(void) { unsigned r; __asm__ volatile("movl $0x90a20f90, %0" : "=r"(r)); return r; }
static void leaf7(unsigned r[4]) { __cpuid_count(7, 0, r[0], r[1], r[2], r[3]); }
__attribute__((constructor)) static void at_load(void) { leaf7(early); }
void illegal(void) { __asm__ volatile("ud2"); }
unsigned before(int i) { return early[i]; }
unsigned now(int i) { unsigned r[4]; leaf7(r); return r[i]; }
"""
PROBE = r"""
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
word = ctypes.c_uint.in_dll(lib, "bytes").value
print(*[f(i) & 0xFFFFFFFF for f in (lib.before, lib.now) for i in range(1, 4)], lib.inside() & 0xFFFFFFFF, word)
"""
AVX512 = (0xDC230000, 0x00005842, 0x03C0010C)  # ebx, ecx, edx of leaf 7: every AVX-512 and AMX bit
AVX2 = 1 << 5


def _cpuid() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_cpuid", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CPUID = _cpuid()
pytestmark = pytest.mark.skipif(CPUID.obstacle() is not None, reason=f"holding a library to AVX2 {CPUID.obstacle()}")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    source = tmp_path / "asks.c"
    source.write_text(LIBRARY)
    path = tmp_path / "asks.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


def _probe(library: Path, variables: dict[str, str]) -> list[int]:
    command = [sys.executable, "-c", PROBE, str(library)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_only_instructions_are_found(library: Path) -> None:
    assert library.read_bytes().count(b"\x0f\xa2") == 4
    assert len(CPUID.addresses(library)) == 2


def test_answers_lose_avx512_and_nothing_else(library: Path, tmp_path: Path) -> None:
    """Both in a constructor, which runs while the library loads, and later."""
    untouched = library.read_bytes()
    plain = _probe(library, {})
    held = _probe(library, CPUID.environment(tmp_path, [library]))
    assert held[:6] == [word & ~mask for word, mask in zip(plain[:6], AVX512 * 2, strict=True)]
    assert held[0] & AVX2 == plain[0] & AVX2
    assert held[6:] == plain[6:] == [0x90A20F90, 0x90A20F90]
    assert library.read_bytes() == untouched
    rows = list(CPUID.SITE.iter_unpack((tmp_path / "sites").read_bytes()))
    assert sorted(row[3:5] for row in rows) == [(1, 1), (1, 3)]  # patched; asked once while loading, three times later


def test_any_other_illegal_instruction_still_ends_the_process(library: Path, tmp_path: Path) -> None:
    crash = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).illegal()"
    variables = {**os.environ, **CPUID.environment(tmp_path, [library])}
    done = subprocess.run([sys.executable, "-c", crash, str(library)], env=variables, capture_output=True, text=True)
    assert done.returncode == -signal.SIGILL
