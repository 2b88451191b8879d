"""The generators go on where their state was taken, after a way through a checkpoint file."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lightrft.random_state import random_state, set_random_state


def draws() -> list[float]:
    # An odd number of normals leaves a spare one in Python's and NumPy's generators, which is part of their state.
    return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), float(torch.randn(3)[0])]


@pytest.mark.parametrize("spare", [0, 1])
def test_every_generator_repeats_itself_from_a_saved_state(tmp_path: Path, spare: int) -> None:
    for _ in range(spare):
        draws()
    torch.save(random_state(), tmp_path / "state.pt")
    wanted = [draws() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draws() != wanted[0]
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draws() for _ in range(3)] == wanted


def test_a_state_taken_is_not_moved_by_what_is_drawn_later() -> None:
    state = random_state()
    wanted = draws()
    draws()
    for _ in range(2):
        set_random_state(state)
        assert draws() == wanted
