"""Where a float kernel of ours is faster than what Inductor generates: measured tables, as pure functions.

Rows were measured on an AMD EPYC (Zen 4) held to AVX2, two threads, a softmax alone in its graph. Inductor fuses a softmax
with its neighbours, so short rows are left to it, and so is every instruction set that was not measured.
"""

# Instruction set → fewest elements of a row from which the kernel is used, for softmax and for log-softmax.
SOFTMAX_FROM = {"avx2": (2048, 2048), "avx_vnni": (2048, 2048)}


def softmax_wins(isa: str, n: int, log: bool) -> bool:
    """Whether our softmax (or log-softmax) over rows of n elements is the faster one."""
    limits = SOFTMAX_FROM.get(isa)
    return limits is not None and n >= limits[log]
