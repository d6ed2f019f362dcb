"""``python benchmarks/accuracy``: the folders beside it are where its own package, the other benchmarks and the examples are."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples")]

if __name__ == "__main__":
    from accuracy.suite import main

    main()
