"""Runs both sides of a rule on sympy symbols: the algebra behind ``proof=ALGEBRA``. Imported by tests only."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sympy as sp
import torch

from fxquant.passes.rule import Rule, Sizes, size_of


class Symbols:
    """An array of sympy expressions that answers torch's functions by their algebraic meaning."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values, dtype=object)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> None:
        return None  # symbols are exact in every dtype

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> "Symbols":
        return _call(function.__name__.partition(".")[0], args, kwargs or {})

    def __getattr__(self, name: str) -> Callable[..., "Symbols"]:
        if name.startswith("__") or name not in _FUNCTIONS:
            raise AttributeError(name)
        return lambda *args, **kwargs: _call(name, (self, *args), kwargs)

    def __getitem__(self, index: int) -> "Symbols":
        return self  # torch.max(...)[0]: the values themselves

    def __neg__(self) -> "Symbols":
        return Symbols(-self.values)

    def __add__(self, other: Any) -> "Symbols":
        return Symbols(self.values + _raw(other))

    def __sub__(self, other: Any) -> "Symbols":
        return Symbols(self.values - _raw(other))

    def __rsub__(self, other: Any) -> "Symbols":
        return Symbols(_raw(other) - self.values)

    def __matmul__(self, other: Any) -> "Symbols":
        return Symbols(self.values @ _raw(other))

    def __mul__(self, other: Any) -> "Symbols":
        return Symbols(self.values * _raw(other))

    def __truediv__(self, other: Any) -> "Symbols":
        return Symbols(self.values / _raw(other))

    def __rtruediv__(self, other: Any) -> "Symbols":
        return Symbols(_raw(other) / self.values)

    __radd__ = __add__
    __rmul__ = __mul__


class Number(float):
    """A float that stands for a symbol, for torch functions that take nothing but floats."""

    symbol: Any

    @classmethod
    def of(cls, symbol: Any) -> "Number":
        number = cls(0.7)  # never looked at
        number.symbol = symbol
        return number


def prove(rule: Rule, spelling: int) -> bool:
    """Whether pattern and rewrite are the same expressions for tensors of symbols (sizes 2) and symbolic scalars."""
    operands = _symbols(rule)
    try:
        return _are_same(rule, spelling, operands)
    except TypeError:  # a function of torch that is strict about numbers
        boxed = {name: Number.of(value) if isinstance(value, sp.Symbol) else value for name, value in operands.items()}
        return _are_same(rule, spelling, boxed)


def _are_same(rule: Rule, spelling: int, operands: Mapping[str, Any]) -> bool:
    function = rule.all_spellings[spelling]
    names = _arguments(function)
    left = function(**{name: operands[name] for name in names})
    assert rule.rewrite is not None
    known = {*names, *rule.vectors}
    right = rule.rewrite(**{name: operands[name] if name in known else None for name in _arguments(rule.rewrite)})
    if rule.reweights:
        changed = {name: value for name, value in right.items() if name in names}
        right = function(**{**{name: operands[name] for name in names}, **changed})
    pairs = zip(left.values.ravel(), right.values.ravel(), strict=True)
    return left.shape == right.shape and all(_is_zero(a - b) for a, b in pairs)


def _symbols(rule: Rule) -> dict[str, Any]:
    """Operands of a rule: symbols for tensors (sizes 2) and for numbers."""
    sizes = {part: 2 for shape in rule.shapes.values() for name in shape.split() for part in name.split("*")} | {"one": 1}
    operands: dict[str, Any] = {}
    for name, shape in rule.shapes.items():
        dims = tuple(size_of(s, sizes) for s in shape.split())
        sign = {"positive": True} if rule.samples.values.get(name) == "positive" else {"real": True}
        flat = [sp.Symbol(f"{name}{i}", **sign) for i in range(int(np.prod(dims)))]
        if rule.samples.values.get(name) == "pairs":
            flat = [flat[i - i % 2] for i in range(len(flat))]
        operands[name] = Symbols(np.array(flat, dtype=object).reshape(dims))
        if rule.samples.values.get(name) == "orthonormal":
            operands[name] = Symbols(_rotation(sp.Symbol(name, real=True)))
    for name, value in rule.samples.values.items():
        if name not in operands:
            operands[name] = sp.Symbol(name, positive=True) if isinstance(value, float) else value
        if callable(value) and not isinstance(value, torch.dtype):
            operands[name] = value(sizes)
        elif isinstance(value, Sizes):
            operands[name] = [size_of(s, sizes) for s in value.split()]
    return operands


def _rotation(t: Any) -> Any:
    """Every rotation of the plane: (cos t)² + (sin t)² = 1 is used by ``_normal``."""
    return [[sp.cos(t), -sp.sin(t)], [sp.sin(t), sp.cos(t)]]


def _normal(expression: Any) -> Any:
    """A polynomial written out, with even powers of a sine as those of the cosine."""
    flat = sp.expand(expression)
    for sine in flat.atoms(sp.sin):
        rest = sp.rem(sp.Poly(flat, sine), sp.Poly(sine**2 + sp.cos(sine.args[0]) ** 2 - 1, sine))
        flat = sp.expand(rest.as_expr())
    return flat


def _arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount]


def _is_zero(expression: Any) -> bool:
    exact = sp.nsimplify(expression, rational=False) if expression.has(sp.Float) else expression
    if exact == 0 or (exact.has(sp.sin) and _normal(sp.numer(sp.together(exact))) == 0) or sp.simplify(exact) == 0:
        return True
    # Constants such as √(2/π) are written in decimals: the difference must vanish numerically at every symbol's value.
    points = ({s: sp.Rational(3 * i + j + 1, 7) for i, s in enumerate(sorted(exact.free_symbols, key=str))} for j in range(3))
    return expression.has(sp.Float) and all(abs(expression.subs(p).evalf(30)) < 1e-9 for p in points)


def _raw(value: Any) -> Any:
    if isinstance(value, (Symbols, Number)):
        return value.values if isinstance(value, Symbols) else value.symbol
    return sp.nsimplify(value) if isinstance(value, int) else value


def _call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Symbols:
    named = {key: _raw_argument(value) for key, value in kwargs.items()}
    return Symbols(_FUNCTIONS[name](*(_raw_argument(a) for a in args), **named))


def _raw_argument(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_raw_argument(v) for v in value]
    if isinstance(value, Number):
        return value.symbol
    return value.values if isinstance(value, Symbols) else value


def _each(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return np.vectorize(function, otypes=[object])


def _mean(x: Any, dim: Any = -1, keepdim: bool = False) -> Any:
    return x.sum(-1, keepdims=keepdim) / sp.Integer(x.shape[-1])


def _var(x: Any, dim: Any = -1, unbiased: bool = False, keepdim: bool = False, correction: int = 0) -> Any:
    return _mean((x - _mean(x, -1, True)) ** 2, -1, keepdim)


def _layer_norm(x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any) -> Any:
    normal = (x - _mean(x, -1, True)) / _each(sp.sqrt)(_var(x, -1, keepdim=True) + eps)
    return (normal if weight is None else weight * normal) + (0 if bias is None else bias)


def _rms_norm(x: Any, normalized_shape: Any, weight: Any, eps: Any) -> Any:
    return (1 if weight is None else weight) * x / _each(sp.sqrt)(_each(_normal)(_mean(x**2, -1, True)) + eps)


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: Any, eps: Any, fast: bool
) -> Any:
    weight, bias, mean, var = (v.reshape(-1, 1) for v in (weight, bias, mean, var))
    return weight * (x - mean) / _each(sp.sqrt)(var + eps) + bias


def _softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    """An unknown function of a row: two are equal where all their scores are."""
    rows = _each(sp.expand)(x).reshape(-1, x.shape[-1])
    made = [[sp.Function("softmax")(i, *row) for i in range(len(row))] for row in rows]
    return np.array(made, dtype=object).reshape(x.shape)


def _attention(q: Any, k: Any, v: Any, mask: Any, dropout: Any, causal: bool, scale: Any, enable_gqa: bool) -> Any:
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    return _softmax(q @ np.swapaxes(k, -2, -1) * scale + (0 if mask is None else mask), -1) @ v


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + sp.exp(-x))


def _gelu(x: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        return x * (1 + sp.erf(x / sp.sqrt(2))) / 2
    return x * (1 + sp.tanh(sp.sqrt(2 / sp.pi) * (x + sp.Rational(44715, 1000000) * x**3))) / 2


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return x @ weight.T + (0 if bias is None else bias)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exp": _each(sp.exp),
    "erf": _each(sp.erf),
    "tanh": _each(sp.tanh),
    "sqrt": _each(lambda v: sp.sqrt(_normal(v) if v.has(sp.sin) else v)),
    "rsqrt": _each(lambda v: 1 / sp.sqrt(v)),
    "sigmoid": _each(_sigmoid),
    "silu": lambda x, inplace=False: _each(lambda v: v * _sigmoid(v))(x),
    "pow": lambda x, p: x ** sp.nsimplify(p),
    "gelu": lambda x, approximate="none": _each(lambda v: _gelu(v, approximate))(x),
    "mean": _mean,
    "var": _var,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "matmul": lambda a, b: a @ b,
    "addmm": lambda c, a, b: c + a @ b,
    "linear": _linear,
    "softmax": _softmax,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
    "to": lambda x, dtype: x,
    "t": lambda x: x.T,
    "transpose": np.swapaxes,
    "unsqueeze": np.expand_dims,
    "reshape": lambda x, shape: x.reshape(shape),
    "flatten": lambda x, start=0: x.reshape(*x.shape[:start], -1),
    "sum": lambda x, dim: x.sum(dim),
    "exp2": _each(lambda v: 2**v),
    "repeat_interleave": lambda x, repeats, dim: np.repeat(x, repeats, dim),
    "slice": lambda x, dim, start, end: np.moveaxis(np.moveaxis(x, dim, 0)[start:end], 0, dim),
    "neg": lambda x: -x,
    "expand": np.broadcast_to,
    "cat": lambda parts, dim: np.concatenate(parts, dim),
    "einsum": lambda equation, *operands: np.einsum(equation, *operands),
}
