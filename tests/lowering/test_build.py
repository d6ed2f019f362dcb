import subprocess
import sys
from pathlib import Path

import pytest

from fxquant.errors import KernelBuildError
from fxquant.lowering.cpu import build

SIMDE = Path("/usr/include/simde")


def test_the_library_is_built_once_and_a_damaged_one_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = build.library_path(tmp_path)
    first = path.stat().st_mtime_ns
    assert "building the kernel library (once a machine)" in capfd.readouterr().err
    assert build.library_path(tmp_path).stat().st_mtime_ns == first
    assert capfd.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:1000])
    assert build.library_path(tmp_path).stat().st_size > 1000
    assert "building" in capfd.readouterr().err


def test_without_a_compiler_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelBuildError, match=r"no C\+\+ compiler found \(looked for g\+\+, c\+\+, clang\+\+\).*set CXX"):
        build.find_compiler()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(KernelBuildError, match="set FXQUANT_CACHE"):
        build.library_path(blocked / "cache")


def test_a_compiler_error_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(KernelBuildError, match="does not compile"):
        build.library_path(tmp_path)
    assert not list(tmp_path.glob("*.so"))


@pytest.mark.parametrize(("unit", "table"), [("linear_avxvnni.cpp", "kAvxVnni"), ("linear_avx512vnni.cpp", "kAvx512Vnni")])
def test_vnni_kernels_run_through_simde_without_vnni(unit: str, table: str, tmp_path: Path) -> None:
    """The same sources, compiled for plain AVX2 with SIMDe in the place of the instructions, against the scalar kernels."""
    if not SIMDE.is_dir():
        pytest.skip("SIMDe is not installed (Debian: libsimde-dev)")
    program = tmp_path / "check"
    sources = [build.SOURCES / name for name in (unit, "linear_scalar.cpp", "pack.cpp")]
    check = Path(__file__).parent / "simde_check.cpp"
    flags = ["-std=c++20", "-O1", "-mavx2", "-mfma", "-ffp-contract=off", "-DFXQUANT_SIMDE", f"-DTABLE={table}", "-w"]
    command = [
        build.find_compiler(),
        *flags,
        f"-I{build.SOURCES}",
        f"-I{check.parent}",
        str(check),
        *map(str, sources),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(program)], check=False, capture_output=True, text=True)
    assert done.stdout.strip().endswith("0 differences"), done.stdout
    assert done.returncode == 0


def test_it_builds_ahead_of_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fxquant.lowering.cpu.build", "--into", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert len(list(tmp_path.glob("libfxquant-*.so"))) == 1
