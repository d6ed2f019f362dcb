"""Calibration's peak of resident memory, few batches against many, each in a process of its own.

Counted is what the process has written itself (RssAnon: tensors, Python objects), looked at every few milliseconds: mapped
files come and go with what else the machine does. The count begins when the model is loaded, which has a peak of its own.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

FEW, MANY = 16, 1024
SHAPE = (2, 64)  # rows, tokens of a batch
SCHEME = "w8a8"
PERIOD_S = 0.005


def report_memory(methods: list[str]) -> None:
    """Print the peaks of every method that calibrates, and their ratio."""
    print("| method | peak MiB, 16 batches | 1,024 batches | ratio |\n|---|---|---|---|")
    for method in methods:
        if method != "dynamic":
            few, many = (peak_of_child(method, count) for count in (FEW, MANY))
            print(f"| {method} | {few:.1f} | {many:.1f} | {many / few:.3f} |", flush=True)


def peak_of_child(method: str, batches: int) -> float:
    """MiB that a new process held at most while it calibrated."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; from accuracy.memory import calibrate_once; calibrate_once()"
    done = subprocess.run([sys.executable, "-c", code, method, str(batches)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"calibration by {method} on {batches} batches failed: {done.stderr[-2000:]}")
    peak: float = json.loads(done.stdout.splitlines()[-1])["peak_mib"]
    return peak


def calibrate_once() -> None:
    """In the child: MiniLM on random tokens, every batch another; prints the peak."""
    import fxquant
    from accuracy.minilm_sentences import MiniLM
    from accuracy.suite import prepare

    method, count = sys.argv[1], int(sys.argv[2])
    prepare()
    model = MiniLM().load()
    with Peak() as peak:
        found = fxquant.calibrate(model, random_batches(count), scheme=SCHEME, method=method)
    print(json.dumps({"batches": found.batches, "peak_mib": peak.mib}))


def random_batches(count: int) -> Iterator[dict[str, Tensor]]:
    """Token ids of one shape, made when they are asked for."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(1000, 30000, SHAPE, generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


class Peak:
    """The most that this process holds while the block runs, in MiB."""

    def __init__(self) -> None:
        self.mib = held_mib()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.mib = max(self.mib, held_mib())
            if self._over.wait(PERIOD_S):
                return


def held_mib() -> float:
    """Resident memory of this process that is no file's."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024
