"""One place for private torch names, and the shape of the repository."""

import ast
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxquant
from fxquant import _compat
from fxquant.lowering.salt import cache_salt, source_digest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fxquant", "passes", "lowering")
SOURCES = [p for f in FOLDERS for p in sorted((ROOT / f).rglob("*")) if p.suffix in (".py", ".h", ".cpp") and p.is_file()]
OWN = [p for p in SOURCES if p.suffix == ".py" and not {"passes", "lowering"} & set(p.relative_to(ROOT).parts[1:2])]


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("path", OWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_torch_names_are_imported_in_compat_only(path: Path) -> None:
    private = [name for name in imported(path) if name.startswith("torch.") and "._" in name]
    assert path.name == "_compat.py" or private == []


def test_only_one_file_registers_with_inductor() -> None:
    users = {path.name for path in OWN if "register_lowering" in path.read_text()}
    assert users == {"inductor.py", "_compat.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.name != "utils.py"


def test_every_private_name_is_there() -> None:
    for name in _compat.__all__:
        assert getattr(_compat, name) is not None
    assert _compat.Inductor.load().CppTemplate.__name__ == "CppTemplate"
    assert "max-autotune" in _compat.inductor_modes()
    assert _compat.frame_fields()["co_name"] == "graph"


def test_the_entry_point_is_installed() -> None:
    (entry,) = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "fxquant"]
    assert entry.load() is sys.modules["fxquant.backend"].fxquant


def test_the_salt_enters_the_cache_key() -> None:
    (salt,) = cache_salt("avx2", {})["post_grad_custom_pre_pass"]
    assert salt.uuid() == f"{source_digest()}-avx2-{_compat.vector_isa()}"
    assert cache_salt("avx2", {"max_autotune": True})["max_autotune"] is True


def test_importing_fxquant_is_light() -> None:
    heavy = ("rich", "transformers", "sympy.printing", "torch._inductor.compile_fx", "matplotlib", "fxquant.backend")
    code = "import torch, sys; before = set(sys.modules); import fxquant; print(*(set(sys.modules) - before))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ.copy()).stdout.split()
    assert not [name for name in loaded if name.startswith(heavy)]


def test_the_public_names_are_exactly_those_listed() -> None:
    public = {n for n in vars(fxquant) if not n.startswith("_") and not isinstance(vars(fxquant)[n], type(sys))}
    assert public == set(fxquant.__all__)


def test_a_size_that_only_the_data_decide_has_no_hint() -> None:
    shapes = ShapeEnv()
    assert _compat.size_hint(7) == 7
    assert _compat.size_hint(shapes.create_unbacked_symint()) is None
