"""Where a float kernel of ours is faster than what Inductor generates: measured tables, as pure functions.

``python benchmarks/softmax.py --lengths`` compiles both sides into graphs, a softmax alone and one that reads x·s + mask,
which Inductor's code does on the way. Measured on an AMD EPYC (Zen 4), held to AVX2 and with AVX-512, one thread: rows of
128 to 262144 elements won in tensors of 2^17 elements or more, 1.1 to 2.1 times; in tensors of 16 Ki elements or fewer the
call of an operator cost more than it saved (0.7 to 0.99).
"""

# Instruction set → fewest and most elements of a row for which the kernel is used.
SOFTMAX_ROWS = dict.fromkeys(("avx2", "avx_vnni", "avx512_vnni"), (128, 1 << 18))
SOFTMAX_ELEMENTS = 1 << 17  # of the whole tensor, at least


def softmax_wins(isa: str, n: int, elements: int) -> bool:
    """Whether our softmax (or log-softmax) over rows of n elements, ``elements`` in all, is the faster one."""
    least, most = SOFTMAX_ROWS.get(isa, (1, 0))
    return least <= n <= most and elements >= SOFTMAX_ELEMENTS
