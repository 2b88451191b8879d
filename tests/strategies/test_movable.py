"""Tensors leave for host memory and come back as they were: the same objects, views and bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightrft.strategies import Movable, to_host

CPU = torch.device("cpu")


def storage_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_memory_is_freed_and_values_come_back_to_the_bit_in_the_same_objects() -> None:
    layer = nn.Linear(300, 200)
    flat = torch.tensor([0.0, -0.0, torch.nan, torch.inf] * 100)
    view = flat[100:300].view(2, 100)
    kept = [tensor.detach().clone() for tensor in (layer.weight, layer.bias, flat, view)]
    names = list(map(id, layer.parameters()))
    movable = Movable(lambda: [*layer.parameters(), flat, view], CPU)
    assert to_host([movable]) == (300 * 200 + 200 + 400) * 4
    assert movable.away and storage_bytes(layer.weight, layer.bias, flat) == 0
    movable.here()
    assert not movable.away and list(map(id, layer.parameters())) == names
    for before, after in zip(kept, (layer.weight, layer.bias, flat, view)):
        assert torch.equal(before.view(torch.int32), after.detach().view(torch.int32))
    flat[100] = 7.0
    assert view[0, 0] == 7.0


def test_what_changed_in_between_leaves_with_its_new_values_but_constants_are_copied_once() -> None:
    tensors = {constant: torch.zeros(10) for constant in (False, True)}
    for constant, tensor in tensors.items():
        movable = Movable(lambda tensor=tensor: [tensor], CPU, constant)  # type: ignore[misc]
        to_host([movable])
        movable.here()
        tensor += 1
        to_host([movable])
        movable.here()
    assert tensors[False].sum() == 10 and tensors[True].sum() == 0


def test_which_ones_leave_is_asked_each_time() -> None:
    state: list[torch.Tensor] = []
    movable = Movable(lambda: state, CPU)
    assert to_host([movable]) == 0
    state.append(torch.ones(5))  # an optimizer's first step makes its state
    movable.here()
    assert to_host([movable]) == 20
    assert to_host([movable]) == 0  # they are away
    state[:] = [torch.ones(3)]
    movable.here()
    assert to_host([movable]) == 12
    movable.here()
    assert state[0].tolist() == [1, 1, 1]


def test_what_cannot_be_emptied_or_lies_elsewhere_stays() -> None:
    borrowed, elsewhere = torch.from_numpy(np.ones(4)), torch.ones(4, device="meta")
    movable = Movable(lambda: [borrowed, elsewhere], CPU)
    assert to_host([movable]) == 0 and borrowed.sum() == 4
    movable.here()
    assert borrowed.sum() == 4


@pytest.mark.gpu
def test_a_gpu_gets_its_memory_back_and_waits_for_values_itself() -> None:
    device = torch.device("cuda", 0)
    tensors = [torch.randn(1 << 22, device=device) for _ in range(8)]
    kept = [tensor.cpu() for tensor in tensors]
    movable = Movable(lambda: tensors, device)
    to_host([movable])  # pinned memory is allocated once
    movable.here()
    for _ in range(5):
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        for tensor in tensors:
            tensor += 1
        assert to_host([movable]) == 8 << 24
        assert torch.cuda.mem_get_info()[0] - free >= 8 << 24  # of the driver, not of torch's pool
        movable.fetch()
        busy = torch.ones(1 << 12, 1 << 12, device=device) @ torch.ones(1 << 12, 1 << 12, device=device)
        movable.here()
        total = sum(tensor.sum() for tensor in tensors) + busy[0, 0] * 0
        kept = [tensor + 1 for tensor in kept]
        assert float(total) == pytest.approx(float(sum(tensor.sum() for tensor in kept)), rel=1e-3)
        assert all(torch.equal(tensor.cpu(), before) for tensor, before in zip(tensors, kept))
