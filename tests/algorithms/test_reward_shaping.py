"""Rewards are penalised, normalised and bounded by their equations, in this order; moments are those of all so far."""

from __future__ import annotations

import math

import pytest
import torch
from algorithms import equations
from algorithms.steps import LONGEST, alone, step
from hypothesis import given
from hypothesis import strategies as st

from lightrft.algorithms import Algorithm, normalized, overlong_penalty
from lightrft.ops.moments import Moments

rewards = st.lists(st.floats(-5, 5, allow_subnormal=False).map(lambda r: round(r, 3)), min_size=1, max_size=8)


@given(st.integers(0, 50), st.integers(1, 40), st.floats(0.05, 0.95))
def test_overlong_penalty(length: int, longest: int, fraction: float) -> None:
    buffer = fraction * longest
    expected = max(-1.0, min(0.0, (longest - buffer - length) / buffer))
    assert overlong_penalty(torch.tensor([length]), longest, buffer).tolist() == pytest.approx([expected], abs=1e-5)


def test_the_penalty_grows_over_the_buffer_alone() -> None:
    got = overlong_penalty(torch.tensor([0, 6, 7, 8, 10, 12]), longest=10, buffer=4).tolist()
    assert got == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])


def scaled(value: float, seen: list[float]) -> float:
    variance = equations.std(seen) ** 2 if len(seen) > 1 and max(seen) > min(seen) else 0.0
    return (value - equations.mean(seen)) / math.sqrt(variance + 1e-8) if variance else 0.0


@given(st.lists(rewards, min_size=1, max_size=3))
def test_normalisation_is_over_all_rewards_so_far(iterations: list[list[float]]) -> None:
    algorithm, seen = Algorithm("reinforce", normalize_rewards=True), []
    for scores in iterations:
        batch = step([[True]] * len(scores), rewards=torch.tensor(scores, dtype=torch.float64)).batch
        algorithm.shape_rewards(batch, LONGEST, alone)
        seen += scores
        assert batch.rewards.tolist() == pytest.approx([scaled(r, seen) for r in scores], rel=1e-6, abs=1e-6)


def test_rewards_that_are_not_trained_on_are_in_no_moments() -> None:
    algorithm = Algorithm("reinforce", normalize_rewards=True)
    mask = [[True], [True], [False]]
    batch = step(mask, [0, 1, 2], rewards=torch.tensor([1.0, 3.0, math.nan], dtype=torch.float64)).batch
    algorithm.shape_rewards(batch, LONGEST, alone)
    assert batch.rewards[:2].tolist() == pytest.approx([-1 / math.sqrt(2 + 1e-8), 1 / math.sqrt(2 + 1e-8)])


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3, 0.3]])
def test_rewards_that_do_not_vary_are_normalised_to_zero_and_so_is_what_is_compared_with_them(
    values: list[float],
) -> None:
    algorithm = Algorithm("remax", normalize_rewards=True)
    batch = step([[True]] * len(values), rewards=torch.tensor(values), greedy_rewards=torch.ones(len(values))).batch
    algorithm.shape_rewards(batch, LONGEST, alone)
    assert not batch.rewards.any() and not batch.greedy_rewards.any()


def test_normalized_leaves_the_moments_as_they_are() -> None:
    moments = Moments.of(torch.tensor([1.0, 3.0]))
    got = normalized(torch.tensor([5.0, 1.0]), moments)
    assert got.tolist() == pytest.approx([3 / math.sqrt(2 + 1e-8), -1 / math.sqrt(2 + 1e-8)])
    assert moments == Moments.of(torch.tensor([1.0, 3.0])) and got.dtype == torch.float32


def test_penalty_then_normalisation_then_bound_and_the_greedy_response_goes_the_same_way() -> None:
    algorithm = Algorithm("remax", overlong_buffer_fraction=0.5, normalize_rewards=True, clip_rewards=0.5)
    mask = [[True] * 4, [True] * 8, [True] * 10]
    mask = [row + [False] * (10 - len(row)) for row in mask]
    batch = step(mask, [0, 1, 2], rewards=torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)).batch
    batch.greedy_rewards, batch.greedy_lengths = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([3, 9, 2])
    algorithm.shape_rewards(batch, LONGEST, alone)
    penalised, greedy = [1.0, 1.0 - 0.6, 0.0 - 1.0], [0.0, 1.0 - 0.8, 1.0]
    expected = [equations.clip(scaled(r, penalised), -0.5, 0.5) for r in penalised]
    assert batch.rewards.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # Its rewards are measured by the moments of the sampled responses, and are not in them.
    expected = [equations.clip(scaled(r, penalised), -0.5, 0.5) for r in greedy]
    assert batch.greedy_rewards.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_nothing_is_shaped_unless_it_is_asked_for() -> None:
    batch, untouched = step().batch, step().batch
    algorithm = Algorithm()
    algorithm.shape_rewards(batch, LONGEST, alone)
    assert torch.equal(batch.rewards, untouched.rewards)
    assert algorithm.state_dict() == Algorithm().state_dict()
