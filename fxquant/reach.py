"""What a function can reach: the modules and tensors in its closure, its defaults, its object and the globals it names.

Dynamo compiles code, and many functions may share one code: only what they reach tells them apart.
"""

import functools
import gc
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LEAVES = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, str, bytes, int, float, complex, type(None))


def reach(values: Iterable[object]) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Every module and tensor behind the values, with the path of attributes and keys that leads to it."""
    pending = deque(("", value) for value in values)
    seen: set[int] = set()
    while pending:
        path, value = pending.popleft()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen.add(id(value))
        if isinstance(value, (nn.Module, Tensor)):
            yield path, value
        else:
            pending.extend((f"{path}.{key}" if path and key else path or key, inner) for key, inner in _inside(value))


def tensor_ids(function: object) -> set[int]:
    """The identities of all tensors and all weights of modules that a function reaches."""
    found: set[int] = set()
    for _, value in reach([function]):
        tensors = [value] if isinstance(value, Tensor) else [*value.parameters(), *value.buffers()]
        found.update(map(id, tensors))
    return found


def globals_named(code: types.CodeType, namespace: Mapping[str, Any]) -> Iterator[object]:
    """The globals that a code, or a function defined in it, names."""
    yield from (namespace[name] for name in code.co_names if name in namespace)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from globals_named(constant, namespace)


def cell_contents(cells: Iterable[types.CellType] | None) -> Iterator[object]:
    """What closure cells hold; an empty cell holds nothing."""
    for cell in cells or ():
        try:
            yield cell.cell_contents
        except ValueError:
            continue


def siblings(function: Callable[..., Any]) -> list[object]:
    """The other live functions, or methods of other objects, that are made by the same code."""
    own = getattr(function, "__self__", None)
    code = getattr(function, "__code__", None)
    made = [f for f in gc.get_referrers(code) if isinstance(f, types.FunctionType) and f.__code__ is code]
    methods = [m for f in made for m in gc.get_referrers(f) if isinstance(m, types.MethodType) and m.__func__ is f]
    bound: list[object] = [m for m in methods if m.__self__ is not own]
    return bound if own is not None else [*bound, *(f for f in made if f is not function)]


def _inside(value: object) -> Iterator[tuple[str, object]]:
    original = getattr(value, "_torchdynamo_orig_callable", None)
    if original is not None:
        yield "", original
    elif isinstance(value, types.MethodType):
        yield from (("", value.__self__), ("", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from (("", inner) for inner in _held_by(value))
    elif isinstance(value, functools.partial):
        yield from (("", inner) for inner in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, Mapping):
        yield from ((str(key), inner) for key, inner in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((str(i), inner) for i, inner in enumerate(value))
    else:
        yield from getattr(value, "__dict__", {}).items()
        slots = (name for kind in type(value).__mro__ for name in _slots(kind))
        yield from ((name, getattr(value, name)) for name in slots if hasattr(value, name))


def _held_by(function: types.FunctionType) -> Iterator[object]:
    if (function.__module__ or "").partition(".")[0] == torch.__name__:
        return  # torch's own functions reach all of torch
    yield from cell_contents(function.__closure__)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from globals_named(function.__code__, function.__globals__)


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
