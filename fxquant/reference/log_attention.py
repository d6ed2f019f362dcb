"""Attention with logarithmic codes of the weights straight from the scores: what the kernel computes, slow and clear.

q, k and v have static uniform codes (or q and k none); every value is its code less the zero point, an exact small float::

    x' = rne(min(max(x / scale, low), high))            s = float(sum_c q' k') * factor + mask * log2 e
    factor = float(scale * log2 e * scale_q * scale_k)  (the product in float64)

With the maximum m of a row, e(t) = 2^t by a table of eighths and a cubic, and L the sum of e(s - m) in 16 lanes::

    lse = float(m + log2 L + log2 δ)                    (float64)
    code = rne(min(max(k (lse - s), 0), zero))          k = 1 log2, 2 log√2, 37 / base AdaLog

The weight of a code is ``δ 2^-shift mantissa / F``, times √2 for an odd code of log√2; that of the code ``zero`` is 0. The
product is integer: in a plane are the weights of some shifts (of one parity), as ``mantissa << (last - shift)``, whose sums
S = sum_j w_j v'_j stay below 2^24 (``groups_of``). One plane is enough for 4-bit log2. Then, in float32, with a unit
``δ 2^-last / F`` (times √2) of each plane::

    y = (S_0 unit_0 + S_1 unit_1 + ...) * scale_v

Levels below 2^-31 δ count as 0. A row with a NaN is NaN, as is a channel of v with one; a row that sees no key is 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.reference.attention import add_mask
from fxquant.reference.log_softmax_codes import LOG2_E

LOG2, LOG_SQRT2, ADALOG = range(3)
PARTS = 37  # of an octave of AdaLog
FARTHEST = 31  # shifts beyond it count as zero
MOST_GROUPS = 4
EXACT = 2**24
SLACK = 1.001  # for the rounding of lse, far more than it is
MAGIC = 1572864.0 + 127.0  # adding it rounds to eighths and leaves 8 (t + 127) in the low bits
CUBIC = tuple(map(float.fromhex, ("0x1.62e432p-1", "0x1.ec0c32p-3", "0x1.c6a004p-5")))
# The bits of 2^(i/8) less i << 20
EIGHTHS = torch.tensor((0, -289342, -509968, -655657, -719629, -694486, -572163, -343865), dtype=torch.int32)


@dataclass(frozen=True)
class LogCodes:
    """The format of the weights: ``codes`` are those other than zero, scale δ and base float32 of one block or one a head."""

    family: int
    width: int
    codes: int
    scale: Tensor
    base: Tensor | None = None

    @property
    def denominator(self) -> int:
        """F."""
        return (2 << self.width) - 2 if self.family == ADALOG else 1

    @property
    def factors(self) -> Tensor:
        """k of every block, float64."""
        ones = torch.ones(self.scale.numel(), dtype=torch.float64)
        if self.base is not None:
            return PARTS / self.base.reshape(-1).to(torch.float64)
        return ones * (2.0 if self.family == LOG_SQRT2 else 1.0)

    def levels(self, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, mantissa and whether it is odd for every code, int64 [codes] and bool."""
        codes = torch.arange(self.codes)
        if self.family == ADALOG:
            assert self.base is not None
            steps = codes * int(self.base.reshape(-1)[block])
            part = torch.exp2(-(steps % PARTS).to(torch.float64) / PARTS)
            return steps // PARTS, torch.round(part * self.denominator).to(torch.int64), codes < 0
        is_odd = (codes % 2 == 1) & (self.family == LOG_SQRT2)
        return ((codes + 1) // 2 if self.family == LOG_SQRT2 else codes), torch.ones_like(codes), is_odd


@dataclass(frozen=True)
class Planes:
    """Weights int64 [blocks, planes, codes + 1], units float32 [blocks, planes], and whether no sum of products is rounded."""

    weights: Tensor
    units: Tensor
    is_exact: bool


def largest_code(top: int, zero_point: Tensor | None) -> int:
    """The greatest magnitude of a code less its zero point."""
    return top if zero_point is None else int(torch.maximum(zero_point.abs(), (top - zero_point).abs()).amax())


def groups_of(p: LogCodes, keys: int, largest: int) -> tuple[list[range], bool]:
    """Ranges of shifts, and whether all their sums are exact, for rows of ``keys`` keys and values up to ``largest``.

    Σ 2^-shift mantissa / F over a row is at most Σ p / δ = 1 / δ times half a step and the rounding of the mantissa, and its
    part from one shift on at most ``keys`` times the greatest of it. The last of four groups takes what is left, exact or not:
    with AdaLog of many bits, many keys or a very small δ sums are rounded, by float32 and in the order of the keys.
    """
    step = torch.exp2(0.5 / p.factors) * (1 + 1 / p.denominator if p.family == ADALOG else 1.0)
    total = float((step * SLACK / p.scale.reshape(-1).to(torch.float64)).amax())
    farthest = min(max(int(p.levels(block)[0].max()) for block in range(p.scale.numel())), FARTHEST)
    groups: list[range] = []
    first, is_exact = 0, True
    while first <= farthest:
        limit = EXACT / (largest * min(float(keys), math.ldexp(total, first))) / p.denominator
        last = min(first + math.frexp(limit)[1] - 1, farthest) if limit >= 1 else farthest
        if len(groups) == MOST_GROUPS - 1 and last < farthest:
            last, limit = farthest, 0.0
        is_exact &= limit >= 1
        groups.append(range(first, last + 1))
        first = last + 1
    return groups, is_exact


def planes_of(p: LogCodes, keys: int, largest: int) -> Planes:
    """The planes of every group: one, or for log√2 one of even and one of odd codes."""
    groups, is_exact = groups_of(p, keys, largest)
    parities = 2 if p.family == LOG_SQRT2 else 1
    weights = torch.zeros(p.scale.numel(), len(groups) * parities, p.codes + 1, dtype=torch.int64)
    units = torch.zeros(weights.shape[:2], dtype=torch.float32)
    for block in range(p.scale.numel()):
        shift, mantissa, is_odd = p.levels(block)
        for plane in range(weights.shape[1]):
            group, parity = groups[plane // parities], plane % parities
            mine = (shift >= group[0]) & (shift <= group[-1]) & (is_odd == bool(parity))
            weights[block, plane, :-1] = torch.where(mine, mantissa << (group[-1] - shift).clamp_min(0), 0)
            unit = math.ldexp(float(p.scale.reshape(-1)[block]), -group[-1]) / p.denominator
            units[block, plane] = unit * (math.sqrt(2.0) if parity else 1.0)
    return Planes(weights, units, is_exact)


@dataclass(frozen=True)
class Trace:
    """Everything on the way: out [..., N, e], scores [..., N, M] and lse [..., N] float32 in base 2, codes int16 [..., N, M],
    sums float32 [planes, ..., N, e], whole numbers."""

    out: Tensor
    scores: Tensor
    lse: Tensor
    codes: Tensor
    sums: Tensor


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, top: int) -> Tensor:
    """Code less zero point, float32, of x; the qparams broadcast to it. NaN stays."""
    high = torch.tensor(float(top)) if zero_point is None else top - zero_point
    low = -high if zero_point is None else -zero_point
    return torch.round(torch.minimum(torch.maximum(x / scale, low), high))


def exp2(t: Tensor) -> Tensor:
    """2^t of float32 t ≤ 0, 0 from -127 down: the operations of the kernel, each rounded."""
    t = torch.where(t < -127, -127.0, t)
    n = t + MAGIC
    f = t - (n - MAGIC)
    bits = n.view(torch.int32)
    scale = (EIGHTHS[bits & 7] + (bits << 20)).view(torch.float32)
    p = (f * CUBIC[2] + CUBIC[1]) * f + CUBIC[0]
    return (p * f) * scale + scale


def sum_lanes(x: Tensor) -> Tensor:
    """The sum float32 [...] of x [..., M]: 16 lanes, then lanes in pairs 8, 4, 2 and 1 apart."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 16))
    total = torch.zeros_like(x[..., :16])
    for part in x.split(16, -1):
        total = total + part
    for apart in (8, 4, 2, 1):
        total = total[..., :apart] + total[..., apart : 2 * apart]
    return total[..., 0]


def log_sums(scores: Tensor, scale: Tensor) -> Tensor:
    """lse float32 [...] of scores [..., M] with δ [...]; infinity for a row that sees no key."""
    top = torch.where(scores.isnan(), -math.inf, scores).amax(-1)
    shift = torch.where(top == -math.inf, 0.0, top)
    total = sum_lanes(exp2(scores - shift[..., None]))
    lse = shift.to(torch.float64) + torch.log2(total.to(torch.float64)) + torch.log2(scale.to(torch.float64))
    return torch.where(total == 0, math.inf, lse.to(torch.float32))


def code_scores(scores: Tensor, lse: Tensor, factor: Tensor, zero: int) -> Tensor:
    """Codes int64 [..., M] with k float32 [...] of every row."""
    t = factor.to(torch.float32)[..., None] * (lse[..., None] - scores)
    t = torch.where(t.isnan(), math.inf, t)
    return torch.round(t.clamp(0, zero)).to(torch.int64)


def attention_log(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    qparams: dict[str, Tensor],
    tops: tuple[int, int, int],
    v_axis: int,
    p: LogCodes,
) -> Trace:
    """Attention of float32 q [B, H, N, d] to k [B, G, M, d] and v [B, G, M, e], or without the heads; G divides H.

    ``qparams`` has the scale of v and perhaps of q and k, and zero points of affine ones (``q_scale``, ``q_zero_point``, ...),
    of one block or one a head; those of v are one a channel with ``v_axis`` -1. ``tops`` are the greatest codes of q, k, v.
    """
    heads = q.shape[1] if q.dim() == 4 else 1
    groups = heads // k.shape[1] if q.dim() == 4 else 1
    wide = q.dim() == 4

    def of(name: str, is_channel: bool = False) -> Tensor | None:
        value = qparams.get(name)
        return value if value is None else value.reshape(-1) if is_channel or not wide else value.reshape(-1, 1, 1)

    coded = {}
    for name, x, top in zip("qkv", (q, k, v), tops, strict=True):
        is_channel = name == "v" and v_axis == -1
        size = of(f"{name}_scale", is_channel)
        coded[name] = x if size is None else quantize(x, size, of(f"{name}_zero_point", is_channel), top)
    given = torch.tensor(q.shape[-1] ** -0.5 if scale is None else scale, dtype=torch.float32).to(torch.float64) * LOG2_E
    spread = {
        name: value.repeat_interleave(groups, 1) if groups > 1 else value for name, value in coded.items() if name in "kv"
    }
    q_scale, k_scale, v_scale = (of(f"{name}_scale", name == "v" and v_axis == -1) for name in "qkv")
    if q_scale is not None and k_scale is not None:
        given = given * q_scale.to(torch.float64) * _spread(k_scale, groups).to(torch.float64)
    sums = (coded["q"].to(torch.float64) @ spread["k"].to(torch.float64).mT).to(torch.float32)
    scores = add_mask(sums * given.to(torch.float32), mask, is_causal)

    rows = torch.zeros(scores.shape[:-1])
    block = torch.arange(heads)[:, None] * (p.scale.numel() > 1) if wide else torch.zeros(1, dtype=torch.int64)
    lse = log_sums(scores, p.scale.reshape(-1)[block] + rows)
    codes = code_scores(scores, lse, p.factors[block] + rows, p.codes)
    found = planes_of(p, k.shape[-2], largest_code(tops[2], qparams.get("v_zero_point")))
    is_bad = spread["v"].isnan()
    values = torch.where(is_bad, 0.0, spread["v"]).to(torch.float64)
    parts = []
    for plane in range(found.weights.shape[1]):
        table = found.weights[:, plane][block.expand(rows.shape)] if wide else found.weights[0, plane].expand(*rows.shape, -1)
        parts.append((torch.gather(table, -1, codes).to(torch.float64) @ values).to(torch.float32))
    out = torch.zeros_like(parts[0])
    for plane, part in enumerate(parts):
        term = part * found.units[:, plane][block][..., None]
        out = term if plane == 0 else out + term
    assert v_scale is not None
    out = out * (_spread(v_scale, groups) if wide and v_axis != -1 else v_scale)
    out = torch.where(lse.isnan()[..., None] | is_bad.any(-2, keepdim=True), math.nan, out)
    return Trace(out, scores, lse, codes.to(torch.int16), torch.stack(parts))


def _spread(per_head: Tensor, groups: int) -> Tensor:
    """Qparams [G, 1, 1] for every query head; one block as it is."""
    return per_head.repeat_interleave(groups, 0) if per_head.numel() > 1 and groups > 1 else per_head
