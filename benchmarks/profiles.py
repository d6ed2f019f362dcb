"""Where the time of a model goes, kernel by kernel: ``--profile SCHEME ...`` of the model benchmarks."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import Model
from torch.profiler import ProfilerActivity, profile

NAMED = {"cpp.enable_kernel_profile": True}  # Inductor's C++ kernels appear under their names
UNTIMED, TIMED = 3, 10
LINES = 16  # of a table


def show_profiles(model: Model, options: argparse.Namespace) -> None:
    """A table of kernels for Inductor, and for each scheme through both code generators."""
    module = model.load()
    for title in options.shapes:
        inputs = model.shapes[title]().inputs
        for name, call in runners(module, options.profile):
            torch._dynamo.reset()
            print(f"\n{model.title}, {title}, {name}: {table(lambda call=call, inputs=inputs: call(**inputs))}", flush=True)


def runners(module: Any, schemes: list[str]) -> Iterator[tuple[str, Any]]:
    """Name and compiled model, compiled at its first call."""
    yield "inductor", torch.compile(module, options=NAMED)
    for scheme in schemes:
        for codegen in ("inductor", "ops"):
            options = {"scheme": scheme, "codegen": codegen, "inductor": NAMED}
            yield f"fxquant {scheme}, codegen {codegen}", torch.compile(module, backend="fxquant", options=options)


def table(call: Callable[[], Any]) -> str:
    """Milliseconds a call by kernel and operand shapes; each kernel at its fastest of all calls, for busy machines."""
    for _ in range(UNTIMED):
        call()
    fastest: dict[tuple[str, str], list[float]] = {}
    for _ in range(TIMED):
        for key, times in spent(call).items():
            fastest[key] = list(map(min, fastest.get(key, times), times))
    rows = sorted(((name, shapes, len(ms), sum(ms)) for (name, shapes), ms in fastest.items()), key=lambda row: -row[3])
    total = sum(row[3] for row in rows)
    rows = [*rows[:LINES], ("everything else", "", 0, sum(row[3] for row in rows[LINES:]))]
    lines = [f"{total:.2f} ms a call", "", "| kernel | operands | calls | ms | share |", "|---|---|---|---|---|"]
    lines += [f"| {name[:90]} | {shapes} | {count} | {ms:.2f} | {ms / total:.0%} |" for name, shapes, count, ms in rows]
    return "\n".join(lines)


def spent(call: Callable[[], Any]) -> dict[tuple[str, str], list[float]]:
    """(kernel, operand shapes) → milliseconds of each of its runs in one call, without the kernels inside it."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    times: dict[tuple[str, str], list[float]] = {}
    for event in seen.events() or ():
        shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes or () if shape)
        times.setdefault((event.name, shapes), []).append(event.self_cpu_time_total / 1e3)
    return times
