import gc
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.binding import Binder, FrozenValue, Packed, Program, Slot
from fxquant.schemes import LinearScheme, Scheme


class Counter:
    """A binder over one weight that packs ``[sum]`` and returns it with the user's input."""

    def __init__(self) -> None:
        self.packs = 0
        slot = Slot("site", FrozenValue((0,), lambda w: w), Scheme(8, 8), self.pack)
        self.binder = Binder(Program(lambda *a: a, (slot,), (1,)), self.variant, self.on_bind)
        self.bound: list[Sequence[Tensor]] = []

    def pack(self, weight: Tensor, scheme: LinearScheme | None) -> Packed:
        self.packs += 1
        if not torch.isfinite(weight).all():
            return Packed(None, reason="not finite")
        return Packed(weight.sum().reshape(1).clone())

    def variant(self, reasons: dict[str, str]) -> Program:
        return Program(lambda *a: ("float", *a, dict(reasons)), (), (0, 1))

    def on_bind(self, packed: dict[str, Packed], tensors: Sequence[Tensor]) -> None:
        self.bound.append(tensors)

    def __call__(self, weight: Tensor) -> Any:
        return self.binder((weight, "x"))


def weight(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((4,), float(value)))


def test_an_unchanged_weight_is_packed_once() -> None:
    counter, w = Counter(), weight()
    assert [counter(w)[0].item() for _ in range(3)] == [4.0] * 3
    assert counter.packs == 1


def test_every_visible_write_repacks() -> None:
    counter, w = Counter(), weight()
    counter(w)
    with torch.no_grad():
        w.copy_(torch.full((4,), 2.0))
        assert counter(w)[0].item() == 8.0
        w.data = torch.full((4,), 3.0)
        assert counter(w)[0].item() == 12.0
        w.mul_(2)
        assert counter(w)[0].item() == 24.0
    assert counter.packs == 4


def test_an_address_cannot_come_back_with_other_contents() -> None:
    counter, w = Counter(), weight()
    for value in range(20):
        w.data = torch.empty(0)
        w.data = torch.full((4,), float(value))
        assert counter(w)[0].item() == 4.0 * value


def test_two_parameters_share_one_program_and_both_stay_packed() -> None:
    counter, a, b = Counter(), weight(1), weight(2)
    for _ in range(3):
        assert (counter(a)[0].item(), counter(b)[0].item()) == (4.0, 8.0)
    assert counter.packs == 2


def test_a_dead_parameter_is_forgotten() -> None:
    counter, w = Counter(), weight()
    counter(w)
    assert counter.binder.resident_bytes > 0
    del w
    counter.bound.clear()
    gc.collect()
    assert counter.binder.resident_bytes == 0


def test_forget_packs_again_at_the_next_call() -> None:
    counter, w = Counter(), weight()
    counter(w)
    w.data.add_(1)  # not visible to PyTorch's version counter
    assert counter(w)[0].item() == 4.0
    counter.binder.forget({id(w)})
    assert counter(w)[0].item() == 8.0


def test_a_weight_that_cannot_be_packed_takes_its_own_variant() -> None:
    counter, good, bad = Counter(), weight(), weight(float("nan"))
    assert counter(good)[0].item() == 4.0
    assert counter(bad)[0] == "float"
    assert counter(bad)[-1] == {"site": "not finite"}
    assert counter(good)[0].item() == 4.0


def test_inference_tensors_are_packed_too() -> None:
    counter = Counter()
    with torch.inference_mode():
        w = torch.full((4,), 5.0)
    assert [counter(w)[0].item() for _ in range(2)] == [20.0, 20.0]
    assert counter.packs == 1


def test_threads_see_their_own_weights() -> None:
    counter, weights, wrong = Counter(), [weight(i) for i in range(4)], []

    def work(i: int) -> None:
        for _ in range(200):
            if counter(weights[i])[0].item() != 4.0 * i:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert counter.packs == 4
