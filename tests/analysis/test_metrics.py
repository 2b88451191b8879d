"""Statistics of what was added, piece by piece, are those of all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.analysis import Metrics

pieces = st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), min_size=1, max_size=5)


@given(pieces)
def test_pieces_add_up(values: list[list[float]]) -> None:
    metrics, everything = Metrics(), [x for piece in values for x in piece]
    for piece in values:
        metrics.mean_and_std("x", torch.tensor(piece, dtype=torch.float64))
        metrics.maximum("largest", torch.tensor(piece, dtype=torch.float64))
    computed = metrics.compute()
    if not everything:
        assert computed == {}
        return
    assert computed["x/mean"] == pytest.approx(np.mean(everything), rel=1e-9, abs=1e-9)
    assert computed["x/std"] == pytest.approx(np.std(everything), rel=1e-6, abs=1e-9)
    assert computed["largest"] == max(everything)


def test_equal_values_have_no_spread() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.mean_and_std("x", torch.full((7,), 0.1, dtype=torch.float64))
    assert metrics.compute()["x/std"] == pytest.approx(0.0, abs=1e-15)


def test_what_is_not_finite_stays_visible() -> None:
    metrics = Metrics()
    metrics.mean("x", torch.tensor([1.0, float("nan")]))
    metrics.mean("y", 2.0)
    computed = metrics.compute()
    assert np.isnan(computed["x"]) and computed["y"] == 2.0
