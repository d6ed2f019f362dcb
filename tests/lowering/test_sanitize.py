"""Every CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer, with guard pages around its buffers.

A kernel's case is one file in ``sanitize/``; all units without torch headers are compiled into the program.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fxquant.lowering.cpu import build

CASES = Path(__file__).parent / "sanitize"
NAMES = sorted(path.stem for path in CASES.glob("*.cpp") if path.stem != "main")
WITH_TORCH = ("_ops.cpp", "_call.cpp")
UNITS = {name: ("-O1", *flags) for name, flags in build.UNITS.items() if not name.endswith(WITH_TORCH)}
SANITIZERS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
COMMON = ("-std=c++20", "-g1", "-ffp-contract=off", "-w", *SANITIZERS)
ERRORS = {
    "read-after": "AddressSanitizer: SEGV",
    "read-before": "AddressSanitizer: SEGV",
    "read-in-assembly": "AddressSanitizer: SEGV",
    "overflow": "signed integer overflow",
    "shift": "shift exponent 32 is too large",
    "misaligned": "misaligned address",
    "leak": "LeakSanitizer",
}


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *words], check=False, capture_output=True, text=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels and all cases in one program."""
    folder, compiler = tmp_path_factory.mktemp("sanitize"), build.find_compiler()
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    linked = subprocess.run([compiler, *SANITIZERS, str(probe), "-o", str(folder / "probe")], check=False, capture_output=True)
    if linked.returncode or run(folder / "probe").returncode:
        pytest.skip(f"{compiler} has no AddressSanitizer (Debian: libasan comes with g++)")
    sources = {build.SOURCES / name: flags for name, flags in UNITS.items()}
    sources |= dict.fromkeys(CASES.glob("*.cpp"), ("-O0",))

    def compile_one(source: Path) -> str:
        to = folder / f"{source.parent.name}-{source.stem}.o"
        command = [compiler, *COMMON, *sources[source], f"-I{build.SOURCES}", "-c", str(source), "-o", str(to)]
        subprocess.run(command, check=True)
        return str(to)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([compiler, *SANITIZERS, *objects, "-o", str(folder / "kernels")], check=True)
    return folder / "kernels"


@pytest.mark.parametrize("name", NAMES)
def test_kernels_stay_in_their_buffers_and_equal_the_scalar_ones(name: str, program: Path) -> None:
    done = run(program, name)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "0 differences" in done.stdout


@pytest.mark.parametrize("error", ERRORS)
def test_the_program_reports_errors(error: str, program: Path) -> None:
    done = run(program, "--break", error)
    assert done.returncode != 0
    assert ERRORS[error] in done.stderr
