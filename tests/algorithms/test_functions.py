"""Each function equals a float64 reference written from its equation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.algorithms import (
    KL_ESTIMATORS,
    StepTotals,
    clipped_ratio_loss,
    group_mean,
    group_norm,
    log_ratio,
    token_weights,
)

finite = st.floats(-50, 50, allow_nan=False)
groups = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.0]), st.booleans()), max_size=14)


def reference_advantages(rows: list[tuple[int, float, bool]], divide: bool) -> list[float]:
    """(R - mean) / (std + 1e-6), std with Bessel's correction; 0 for a group of one and for equal extremes."""
    out = []
    for group, reward, valid in rows:
        scores = [r for g, r, v in rows if g == group and v]
        if not valid or len(scores) < 2 or max(scores) == min(scores):
            out.append(0.0)
            continue
        mean = math.fsum(scores) / len(scores)
        std = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
        out.append((reward - mean) / (std + 1e-6 if divide else 1.0))
    return out


@given(groups)
def test_group_advantages(rows: list[tuple[int, float, bool]]) -> None:
    rewards = torch.tensor([r for _, r, _ in rows], dtype=torch.float64)
    ids = torch.tensor([g for g, _, _ in rows], dtype=torch.int64)
    valid = torch.tensor([v for _, _, v in rows], dtype=torch.bool)
    for function, divide in ((group_norm, True), (group_mean, False)):
        expected = torch.tensor(reference_advantages(rows, divide), dtype=torch.float64)
        torch.testing.assert_close(function(rewards, ids, valid), expected, rtol=1e-9, atol=1e-9)


def test_equal_rewards_have_advantage_exactly_zero_whatever_their_mean_rounds_to() -> None:
    for count in (2, 3, 7, 10):
        rewards = torch.full((count,), 0.1 + 0.2)
        for function in (group_norm, group_mean):
            assert not function(rewards, torch.zeros(count).long(), torch.ones(count).bool()).any()


def test_a_response_that_is_not_trained_on_moves_no_advantage() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 1e9, math.nan]), torch.zeros(4, dtype=torch.int64)
    valid = torch.tensor([True, True, False, False])
    assert group_mean(rewards, groups, valid).tolist() == [0.5, -0.5, 0.0, 0.0]
    assert group_norm(rewards, groups, valid)[2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "equation"),
    [("k1", lambda d: d), ("k2", lambda d: d * d / 2), ("k3", lambda d: math.exp(-d) - 1 + d)],
)
@given(st.floats(-30, 30))
def test_kl_estimators(name: str, equation: object, delta: float) -> None:
    value = KL_ESTIMATORS[name](torch.tensor(delta, dtype=torch.float64))
    assert float(value) == pytest.approx(equation(delta), rel=1e-9, abs=1e-9)  # type: ignore[operator]


def test_k3_is_finite_at_any_distance_and_its_value_is_not_clamped() -> None:
    far = KL_ESTIMATORS["k3"](torch.tensor([-1000.0, -80.0, 1000.0]))
    assert torch.isfinite(far).all()
    assert float(far[2]) == pytest.approx(999.0)
    assert float(far[1]) == pytest.approx(math.exp(80.0), rel=1e-5)


@given(finite, finite, st.floats(-3, 3), st.floats(0.01, 0.9), st.floats(0.01, 5))
def test_clipped_ratio_loss(new: float, old: float, advantage: float, low: float, high: float) -> None:
    ratio = math.exp(min(max(new - old, -20.0), 20.0))
    expected = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    tensors = [torch.tensor([[x]], dtype=torch.float64) for x in (new, old, advantage)]
    loss = clipped_ratio_loss(log_ratio(tensors[0], tensors[1]), tensors[2], low, high)
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_extreme_ratios_overflow_nothing() -> None:
    d = log_ratio(torch.tensor([[1e4, -1e4, 0.0]]), torch.zeros(1, 3))
    assert torch.isfinite(clipped_ratio_loss(d, torch.tensor([[-1.0]]), 0.2, 0.2)).all()


masks = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6)


@given(masks)
def test_token_weights(rows: list[list[bool]]) -> None:
    """Weights of a whole step against the four equations; an empty row is in no denominator."""
    mask = torch.tensor(rows)
    lengths = [sum(row) for row in rows]
    tokens, responses = sum(lengths), sum(1 for length in lengths if length)
    totals = StepTotals(tokens, responses, 32)
    for i, row in enumerate(rows):
        for t, trained in enumerate(row):
            expected = {
                "token_mean": 1 / tokens if trained else 0.0,
                "seq_mean_token_mean": 1 / (responses * lengths[i]) if trained else 0.0,
                "seq_mean_token_sum": 1 / responses if trained else 0.0,
                "token_sum_norm": 1 / (responses * 32) if trained else 0.0,
            }
            for aggregation, weight in expected.items():
                got = float(token_weights(mask, aggregation, totals)[i, t])  # type: ignore[arg-type]
                assert got == pytest.approx(weight, rel=1e-6)
