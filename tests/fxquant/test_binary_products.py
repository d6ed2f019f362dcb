"""Products of one-bit codes: worked examples, and against products of the values that the codes stand for."""

import torch

from fxquant.reference.binary_products import mask_matmul, sign_matmul

RIGHT = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 0]])


def test_the_worked_example_of_signs() -> None:
    assert sign_matmul(torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0]]), RIGHT).tolist() == [[2]]


def test_the_worked_example_of_a_mask() -> None:
    assert mask_matmul(torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0]]), RIGHT.mT).tolist() == [[2]]


def test_products_are_those_of_the_values() -> None:
    left, right = torch.randint(0, 2, (3, 5, 64)), torch.randint(0, 2, (3, 7, 64))
    assert torch.equal(sign_matmul(left, right), (2 * left - 1) @ (2 * right - 1).mT)
    assert torch.equal(mask_matmul(left, right.mT), left @ (2 * right - 1).mT)
