"""``python benchmarks/accuracy``, which finds its own package, the other benchmarks and the examples by their folders."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples")]

if __name__ == "__main__":
    from accuracy.suite import main

    main()
