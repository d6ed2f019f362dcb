import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fxquant.errors import KernelBuildError
from fxquant.lowering.cpu import build

SIMDE = Path("/usr/include/simde")


@pytest.fixture
def quick_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the compiler: writes something to every output and counts the links. Returns the count's file."""
    script, links = tmp_path / "c++", tmp_path / "links"
    script.write_text(
        "#!/bin/sh\n"
        f'for word; do [ "$word" = -shared ] && sleep 1 && echo x >> {links}; done\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'seq 1000 > "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return links


def test_the_library_builds_and_holds_its_c_interface(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(str(build.library_path(tmp_path)))
    assert "building the kernel library (once a machine)" in capfd.readouterr().err
    declared = re.findall(r"(fxquant_\w+)\(", "".join(path.read_text() for path in build.SOURCES.glob("*.h")))
    assert len(declared) > 5
    assert all(hasattr(library, name) for name in declared)


def test_a_library_is_built_once_and_a_damaged_one_again(
    tmp_path: Path, quick_compiler: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = build.library_path(tmp_path)
    first = path.stat().st_mtime_ns
    assert "building the kernel library (once a machine)" in capfd.readouterr().err
    assert build.library_path(tmp_path).stat().st_mtime_ns == first
    assert capfd.readouterr().err == ""
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert build.library_path(tmp_path).read_bytes() == whole
    assert "building" in capfd.readouterr().err
    path.with_suffix(".sha256").unlink()
    build.library_path(tmp_path)
    assert quick_compiler.read_text().count("x") == 3


def test_two_processes_build_once(tmp_path: Path, quick_compiler: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fxquant.lowering.cpu.build import library_path as p; p(Path(sys.argv[1]))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "cache")], stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[1].count(b"building") for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == [0, 1]
    assert quick_compiler.read_text().count("x") == 1


def test_another_torch_or_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = build._file_name.__wrapped__
    name = digest()
    monkeypatch.setattr("torch.__version__", "0.0")
    other_torch = digest()
    monkeypatch.undo()
    for source in build.SOURCES.glob("*.[ch]*"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert digest() == name
    (tmp_path / "pack.cpp").write_bytes(b"")
    assert len({name, other_torch, digest()}) == 3


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


def test_it_builds_ahead_of_time(tmp_path: Path, quick_compiler: Path) -> None:
    command = [sys.executable, "-m", "fxquant.lowering.cpu.build", "--into", str(tmp_path / "new")]
    subprocess.run(command, check=True, capture_output=True)
    assert [path.name for path in (tmp_path / "new").glob("*.so")] == [build._file_name()]
