import os
from collections.abc import Iterator

import pytest
import torch

from fxquant.lowering import timings
from fxquant.lowering.cpu.build import load_library

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _kernels() -> None:
    """The kernel library of this machine, built on first use."""
    load_library()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Every test starts with nothing compiled and the same random numbers."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` plans without a measured table unless a test brings one: no test depends on the machine that measured it."""
    monkeypatch.setattr(timings, "load_table", lambda isa: None)
