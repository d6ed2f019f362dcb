import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {"train_fashion_vit.py": ["--short"]}


def run(name: str) -> str:
    """What an example printed; skips where what it needs is not installed."""
    command = [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if re.search(r"The (model is|data are) missing", done.stderr):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_sentence_search() -> None:
    printed = run("sentence_search.py")
    assert "37 of 37 linears quantized" in printed
    assert "cosine to float: tokens 0.99" in printed


def test_train_fashion_vit() -> None:
    printed = run("train_fashion_vit.py")
    accuracy = {name: float(value) for name, value in re.findall(r"^  (\w+).* ([\d.]+)%$", printed, re.MULTILINE)}
    assert list(accuracy) == ["float", "w8a8", "w4a4"]
    assert accuracy["float"] > 50  # of ten classes
    assert abs(accuracy["w8a8"] - accuracy["float"]) < 2
    assert "25 of 25 linears quantized" in printed


def test_every_example_has_a_test() -> None:
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested
