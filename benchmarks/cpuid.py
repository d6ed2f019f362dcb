"""Holds libraries that have no switch to AVX2: what they learn from the CPUID instruction, ``cpuid.c`` answers.

A process started with ``environment(...)`` has every CPUID instruction of the named libraries replaced in memory, at the
time the dynamic loader maps them. No file is changed. The addresses come from a disassembly, so that the same two bytes
inside data or other instructions stay as they are; it takes seconds a library and is kept by the hash of the file.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SITE = struct.Struct("6Q")  # device, inode and address of the instruction; patched, asked, masked: struct site of cpuid.c
SOURCE = Path(__file__).with_suffix(".c")
STRICT = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]


@dataclass(frozen=True)
class Library:
    """A loaded library: its CPUID instructions, how many were replaced, how often they ran and an answer was changed."""

    name: str
    sites: int
    patched: int
    asked: int
    masked: int

    @property
    def is_held(self) -> bool:
        return self.patched == self.sites


def obstacle() -> str | None:
    """Why this machine cannot hold a library, or None."""
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return "needs an x86-64 CPU and the GNU C library"
    missing = [tool for tool in ("gcc", "objdump") if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)}" if missing else None


def environment(folder: Path, libraries: Iterable[Path]) -> dict[str, str]:
    """Variables of a process in which the libraries are held; the table of their instructions lies in ``folder``."""
    table = folder / "sites"
    with table.open("wb") as file:
        for library in libraries:
            status = library.stat()
            for address in addresses(library):
                file.write(SITE.pack(status.st_dev, status.st_ino, address, 0, 0, 0))
    audit = folder / "cpuid.so"
    subprocess.run(["gcc", "-O2", *STRICT, "-shared", "-fPIC", "-o", str(audit), str(SOURCE)], check=True)
    return {"LD_AUDIT": str(audit), "CPUID_SITES": str(table)}


def shared_libraries(package: str) -> list[Path]:
    """Every shared library inside an installed package, which is not imported; none if it is not there."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    found = (path for folder in folders for path in Path(folder).rglob("*.so*"))
    return sorted({path.resolve() for path in found if path.is_file()})


def addresses(library: Path) -> list[int]:
    """Where the CPUID instructions of a library are, as addresses in the file's own numbering."""
    data = library.read_bytes()
    if b"\x0f\xa2" not in data:
        return []
    kept = Path(tempfile.gettempdir()) / f"cpuid-{os.getuid()}" / hashlib.sha256(data).hexdigest()
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        scratch = kept.with_suffix(f".{os.getpid()}")
        scratch.write_text("\n".join(disassembled(library)))
        scratch.rename(kept)
    return [int(line, 16) for line in kept.read_text().split()]


def disassembled(library: Path) -> Iterator[str]:
    """Hexadecimal addresses of the CPUID instructions, by objdump."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.rstrip().endswith("\tcpuid"):
                yield line.split(":")[0].strip()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def loaded(package: str) -> list[Library]:
    """The libraries of a package that this process has loaded and that contain CPUID, by the table of ``environment``."""
    path = os.environ.get("CPUID_SITES")
    rows = list(SITE.iter_unpack(Path(path).read_bytes())) if path else []
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = []
    for library in shared_libraries(package):
        status = library.stat()
        mine = [row[3:] for row in rows if row[:2] == (status.st_dev, status.st_ino)]
        if mine and str(library) in mapped:
            patched, asked, masked = (sum(column) for column in zip(*mine, strict=True))
            found.append(Library(library.name, len(mine), patched, asked, masked))
    return found


def used_avx512(since: float) -> bool | None:
    """Whether a live thread held AVX-512 state after ``since`` (``time.monotonic``); None where Linux does not tell.

    Linux notes at each context switch whether the registers that only AVX-512 has are in use (``arch_status`` in proc).
    They stay so until someone clears them, which VZEROUPPER does not do.
    """
    spent = []
    for thread in os.listdir("/proc/self/task"):
        status = Path("/proc", thread, "arch_status")
        if not status.exists():
            return None
        spent.append(int(status.read_text().split()[-1]))
    return any(0 <= 1e-3 * elapsed < time.monotonic() - since for elapsed in spent)
