"""Hadamard matrices, entries ±1 with H Hᵀ = n I, and the transform x H / √n.

n = b 2^k: Sylvester's matrix for 2^k, times (Kronecker) one of Paley's for the smallest order b that fits. With χ the
quadratic character of the field of q elements and Q_ab = χ(a - b)::

    q = 3 mod 4, order q + 1:     I + [[0, 1], [-1, Q]]
    q = 1 mod 4, order 2 (q + 1):  S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]],  S = [[0, 1], [1, Q]]

q a prime, or the square or cube of one. The published tables (172, 156) are other matrices: a rotation must be stored with the
weights that were rotated by it. Where no order fits, ``block_order`` names the largest power of two for a block-diagonal one.
"""

from functools import cache

import torch
from torch import Tensor

from fxquant.errors import CalibrationError

LEAST_BLOCK = 32


def hadamard(n: int) -> Tensor:
    """H float64 [n, n].

    Raises:
        CalibrationError: neither construction reaches n.
    """
    base, power = split_order(n)
    matrix: Tensor = torch.kron(_base(base), sylvester(power))
    return matrix


def randomized(n: int, seed: int) -> Tensor:
    """The orthogonal matrix H diag(±1) / √n, float64, of QuaRot."""
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.float64) * 2 - 1
    rotation: Tensor = hadamard(n) * signs / n**0.5
    return rotation


def signed(n: int, seed: int) -> Tensor:
    """QuaRot's matrix without its division, diag(±1) H float32 [n, n]: whole numbers, columns of length √n.

    Where there is no H, Sylvester's for the largest power of two in n, in blocks on the diagonal: columns of its length.
    """
    try:
        matrix = hadamard(n)
    except CalibrationError:
        power = n & -n
        matrix = torch.kron(torch.eye(n // power, dtype=torch.float64), sylvester(power))
    signs = torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (signs * matrix).to(torch.float32)


def transform(x: Tensor) -> Tensor:
    """x H / √n for x [..., n], in x's dtype: additions of the 2^k part, a product with the base."""
    base, power = split_order(x.shape[-1])
    parts = x.reshape(-1, base, power)
    size = 1
    while size < power:
        pairs = parts.view(len(parts), base, -1, 2, size)
        parts = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2)
        parts = parts.reshape(-1, base, power)
        size *= 2
    if base > 1:
        parts = torch.einsum("rap,ab->rbp", parts, _base(base).to(x.dtype))
    result: Tensor = (parts / x.shape[-1] ** 0.5).reshape(x.shape)
    return result


def sylvester(power: int) -> Tensor:
    """H float64 of a power of two."""
    matrix, core = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.kron(core, matrix)
    return matrix


def split_order(n: int) -> tuple[int, int]:
    """b and 2^k with n = b 2^k, b the smallest order of Paley's that fits, or 1.

    Raises:
        CalibrationError: there is none.
    """
    power = n & -n if n > 0 else 1
    while n > 0 and power >= 1:
        if n // power == 1 or paley_field(n // power) is not None:
            return n // power, power
        power //= 2
    raise CalibrationError(
        f"no Hadamard matrix of order {n} can be built from Paley's and Sylvester's; "
        f"blocks of {block_order(n)} on the diagonal are possible"
    )


def block_order(n: int) -> int:
    """The largest power of two that divides n.

    Raises:
        CalibrationError: it is below 32, so blocks would hardly mix anything.
    """
    power = n & -n
    if power < LEAST_BLOCK:
        raise CalibrationError(f"{n} has no power of two of at least {LEAST_BLOCK} in it, so no Hadamard blocks either")
    return power


@cache
def paley_field(order: int) -> int | None:
    """q of the construction of this order, or None."""
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and prime_power(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and prime_power(half) else None


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with q = p^m, m of 1, 2, 3, or None."""
    for m in (1, 2, 3):
        p = round(q ** (1 / m))
        if p >= 2 and p**m == q and all(p % divisor for divisor in range(2, int(p**0.5) + 1)):
            return p, m
    return None


@cache
def _base(order: int) -> Tensor:
    """Paley's matrix float64, or [[1]]."""
    q = paley_field(order)
    if q is None:
        return torch.ones(1, 1, dtype=torch.float64)
    core = torch.ones(q + 1, q + 1, dtype=torch.float64)
    core[0, 0], core[1:, 1:] = 0, _character_matrix(q)
    identity = torch.eye(q + 1, dtype=torch.float64)
    if order == q + 1:
        core[1:, 0] = -1
        return identity + core
    return torch.kron(core, _square(1, 1, 1, -1)) + torch.kron(identity, _square(1, -1, -1, -1))


def _square(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64).view(2, 2)


def _character_matrix(q: int) -> Tensor:
    """Q_ab = χ(a - b) float64 [q, q]; an element of the field is a row of m digits below p."""
    found = prime_power(q)
    if found is None:
        raise CalibrationError(f"there is no field of {q} elements here: only of p, p² and p³")
    p, m = found
    powers = p ** torch.arange(m)
    digits = torch.arange(q)[:, None] // powers % p  # [q, m]
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[(_field_squares(digits, p, m) * powers).sum(1)] = 1
    character[0] = 0
    return character[((digits[:, None] - digits) % p * powers).sum(2)]


def _field_squares(digits: Tensor, p: int, m: int) -> Tensor:
    """The squares of elements [q, m] modulo a monic polynomial of degree m without roots (irreducible, as m ≤ 3)."""
    product = torch.zeros(len(digits), 2 * m - 1, dtype=torch.int64)
    for i in range(m):
        product[:, i : i + m] += digits[:, i : i + 1] * digits
    reduction = _tail(p, m)
    for degree in range(2 * m - 2, m - 1, -1):  # x^m = -(tail)
        product[:, degree - m : degree] -= product[:, degree : degree + 1] * reduction
    return product[:, :m] % p


def _tail(p: int, m: int) -> Tensor:
    """Coefficients t [m] such that x^m + Σ t_i x^i has no root modulo p."""
    x = torch.arange(p)
    for number in range(p**m):
        tail = torch.tensor([number // p**i % p for i in range(m)])
        value = x**m + sum(tail[i] * x**i for i in range(m))
        if m == 1 or bool((value % p != 0).all()):
            return tail
    raise CalibrationError(f"no irreducible polynomial of degree {m} modulo {p}")
