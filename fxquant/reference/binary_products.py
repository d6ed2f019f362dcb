"""Products of one-bit codes by counting bits: what a kernel of XNOR or AND with popcount must equal.

A sign code is 1 for +1 and 0 for -1, an attention code is 1 or 0 for itself; codes are int64 0 and 1. The products are exact
integers, times the scales of both sides. vit-quantizers section 12.1.
"""

import torch
from torch import Tensor


def sign_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``2 popcount(xnor(a, b)) - d`` int64 [..., M, N] of sign codes [..., M, d] and [..., N, d]: ``a bᵀ`` of the signs."""
    agreeing = left @ right.mT + (1 - left) @ (1 - right).mT
    return 2 * agreeing - left.shape[-1]


def mask_matmul(chosen: Tensor, signs: Tensor) -> Tensor:
    """``2 popcount(A & v⁺) - popcount(A)`` int64 [..., M, D] of attention codes [..., M, J] and sign codes [..., J, D]."""
    return 2 * (chosen @ signs) - torch.sum(chosen, -1, keepdim=True)
