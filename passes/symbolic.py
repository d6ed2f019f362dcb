"""Runs both sides of a rule on sympy symbols: the algebra behind ``proof=ALGEBRA``. Imported by tests only."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sympy as sp

from fxquant.passes.rule import Rule


class Symbols:
    """An array of sympy expressions that answers torch's functions by their algebraic meaning."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values, dtype=object)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> "Symbols":
        return _call(function.__name__, args, kwargs or {})

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

    def __mul__(self, other: Any) -> "Symbols":
        return Symbols(self.values * _raw(other))

    def __truediv__(self, other: Any) -> "Symbols":
        return Symbols(self.values / _raw(other))

    __radd__ = __add__
    __rmul__ = __mul__


def prove(rule: Rule, spelling: int) -> bool:
    """Whether pattern and rewrite are the same expressions for tensors of symbols (sizes 2) and symbolic scalars."""
    sizes = {name: 2 for shape in rule.shapes.values() for name in shape.split()}
    operands: dict[str, Any] = {}
    for name, shape in rule.shapes.items():
        dims = tuple(sizes[s] for s in shape.split())
        flat = [sp.Symbol(f"{name}{i}", real=True) for i in range(int(np.prod(dims)))]
        operands[name] = Symbols(np.array(flat, dtype=object).reshape(dims))
    for name, value in rule.samples.values.items():
        operands[name] = sp.Symbol(name, positive=True) if isinstance(value, float) else value
    function = rule.all_spellings[spelling]
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    left = function(**{name: operands[name] for name in names})
    assert rule.rewrite is not None
    wanted = rule.rewrite.__code__.co_varnames[: rule.rewrite.__code__.co_argcount]
    right = rule.rewrite(**{name: operands[name] if name in names else None for name in wanted})
    pairs = zip(left.values.ravel(), right.values.ravel(), strict=True)
    return left.shape == right.shape and all(_is_zero(a - b) for a, b in pairs)


def _is_zero(expression: Any) -> bool:
    exact = sp.nsimplify(expression, rational=False) if expression.has(sp.Float) else expression
    if exact == 0 or sp.simplify(exact) == 0:
        return True
    # Constants such as √(2/π) are written in decimals: the difference must vanish numerically at every symbol's value.
    points = ({s: sp.Rational(3 * i + j + 1, 7) for i, s in enumerate(sorted(exact.free_symbols, key=str))} for j in range(3))
    return expression.has(sp.Float) and all(abs(expression.subs(p).evalf(30)) < 1e-9 for p in points)


def _raw(value: Any) -> Any:
    if isinstance(value, Symbols):
        return value.values
    return sp.nsimplify(value) if isinstance(value, int) else value


def _call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Symbols:
    named = {key: _raw_argument(value) for key, value in kwargs.items()}
    return Symbols(_FUNCTIONS[name](*(_raw_argument(a) for a in args), **named))


def _raw_argument(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_raw_argument(v) for v in value]
    return value.values if isinstance(value, Symbols) else value


def _each(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return np.vectorize(function, otypes=[object])


def _mean(x: Any, dim: Any = -1, keepdim: bool = False) -> Any:
    return x.sum(-1, keepdims=keepdim) / sp.Integer(x.shape[-1])


def _var(x: Any, dim: Any = -1, unbiased: bool = False, keepdim: bool = False, correction: int = 0) -> Any:
    return _mean((x - _mean(x, -1, True)) ** 2, -1, keepdim)


def _layer_norm(x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any) -> Any:
    return weight * (x - _mean(x, -1, True)) / _each(sp.sqrt)(_var(x, -1, keepdim=True) + eps) + bias


def _rms_norm(x: Any, normalized_shape: Any, weight: Any, eps: Any) -> Any:
    return weight * x / _each(sp.sqrt)(_mean(x**2, -1, True) + eps)


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
    "sqrt": _each(sp.sqrt),
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
    "t": lambda x: x.T,
    "einsum": lambda equation, *operands: np.einsum(equation, *operands),
}
