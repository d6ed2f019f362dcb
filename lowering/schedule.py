"""Where a float kernel of ours is faster than what Inductor generates: measured tables, as pure functions.

Rows were measured on an AMD EPYC (Zen 4) held to AVX2, two threads, a softmax alone in its graph, on a machine with other
work on it: only rows that won clearly are taken. Inductor fuses a softmax with its neighbours, so short rows are left to
it, and so is every instruction set that was not measured.
"""

# Instruction set → fewest and most elements of a row for which the kernel is used.
SOFTMAX_ROWS = {"avx2": (2048, 131072), "avx_vnni": (2048, 131072)}


def softmax_wins(isa: str, n: int) -> bool:
    """Whether our softmax (or log-softmax) over rows of n elements is the faster one."""
    least, most = SOFTMAX_ROWS.get(isa, (1, 0))
    return least <= n <= most
