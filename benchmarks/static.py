"""Static against dynamic activations of MiniLM: ``python benchmarks/static.py [SCHEME ...]``.

Calibrated on 16 pieces of John, 128 tokens each; compared with the float model on 16 pieces of Luke, by the mean and the
lowest cosine of a token's embedding. Both use ``codegen="ops"``: the integers do not depend on how code is generated.
"""

import gc
import sys
from typing import Any

import torch
from minilm import JOHN, held_out, load, tokens, verses

import fxquant

SCHEMES = ("w8a8", "w8a7", "w7a7", "w6a6")
PIECES, TOKENS = 16, 128


@torch.no_grad()
def main() -> None:
    """Print one line a scheme."""
    model = load()
    seen, unseen = tokens(verses(JOHN), PIECES, TOKENS), held_out(PIECES, TOKENS)
    exact, kept = model(**unseen)[0], unseen["attention_mask"].bool()
    print(f"{'scheme':8}{'dynamic':>10}{'lowest':>9}{'static':>10}{'lowest':>9}   static linears")
    for scheme in sys.argv[1:] or SCHEMES:
        calibration = fxquant.calibrate(model, [seen], scheme=scheme)
        columns = ""
        for given in (None, calibration):
            torch._dynamo.reset()
            compiled = None
            gc.collect()  # a report lists every graph that is alive
            options: Any = {"scheme": scheme, "calibration": given, "codegen": "ops"}
            compiled = torch.compile(model, backend="fxquant", options=options)
            cosines = torch.cosine_similarity(compiled(**unseen)[0], exact, dim=-1)[kept]
            columns += f"{cosines.mean():10.5f}{cosines.min():9.4f}"
        rows = [row for row in fxquant.report(compiled).sites if row.kind == "linear"]
        static = sum(row.kernel == "linear_static" for row in rows)
        print(f"{scheme:8}{columns}   {static} of {len(rows)}", flush=True)


if __name__ == "__main__":
    main()
