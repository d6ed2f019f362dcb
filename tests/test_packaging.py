import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
import torch
linear, x = torch.nn.Linear(64, 64), torch.randn(2, 64)
with torch.no_grad():
    y = torch.compile(linear, backend="fxquant", options={"codegen": "ops", "scheme": "w8a8"})(x)
import fxquant
assert "site-packages" not in fxquant.__file__ and "unpacked" in fxquant.__file__, fxquant.__file__
assert fxquant.report(torch.compile(linear, backend="fxquant")).sites[0].scheme == "w8a8"
print("kernel ran", float((y - linear(x)).abs().max()) < 0.1)
"""


def test_the_packages_listed_are_those_on_disk() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "fxquant").rglob("__init__.py")}
    for folder in ("passes", "lowering"):
        found |= {f"fxquant.{'.'.join(p.parent.relative_to(ROOT).parts)}" for p in (ROOT / folder).rglob("__init__.py")}
    assert listed == found


def test_a_wheel_runs_a_kernel_from_any_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(unpacked)
    assert {"fxquant/lowering/cpu/linear.h", "fxquant/lowering/cpu/linear_ops.cpp", "fxquant/py.typed"} <= set(names)
    run = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(run, cwd=tmp_path, env={**env(), "PYTHONPATH": str(unpacked)}, capture_output=True, text=True)
    assert "kernel ran True" in done.stdout, done.stderr[-2000:]


def env() -> dict[str, str]:
    import os

    return dict(os.environ)
