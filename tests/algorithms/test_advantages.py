"""Each advantage equals its equation in Python floats, is exactly 0 where nothing can be compared, and never NaN."""

from __future__ import annotations

import math

import pytest
import torch
from algorithms import equations
from algorithms.steps import alone, masks, ragged, step
from hypothesis import given
from hypothesis import strategies as st

from lightrft.algorithms import Advantage, gae, group_mean, group_norm, has_spread, rewards_to_go, rloo, whiten

FUNCTIONS = {"group_norm": group_norm, "group_mean": group_mean, "rloo": rloo}
members = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.0]), st.booleans()), max_size=14
)
discounts = st.floats(0.05, 1.0)


@pytest.mark.parametrize("kind", FUNCTIONS)
@given(members)
def test_group_advantages(kind: str, rows: list[tuple[int, float, bool]]) -> None:
    groups, rewards, trained = zip(*rows) if rows else ((), (), ())
    arguments = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups).long(), torch.tensor(trained).bool()
    expected = equations.group_advantages(kind, rewards, groups, [int(on) for on in trained])
    assert FUNCTIONS[kind](*arguments).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(members)
def test_a_group_has_spread_where_two_trained_members_differ(rows: list[tuple[int, float, bool]]) -> None:
    groups, rewards, trained = zip(*rows) if rows else ((), (), ())
    arguments = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups).long(), torch.tensor(trained).bool()
    expected = [len({r for g, r, on in rows if g == group and on}) > 1 for group in groups]
    assert has_spread(*arguments).tolist() == expected


def test_the_std_is_damped_by_the_epsilon_that_is_given() -> None:
    arguments = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(2).long(), torch.ones(2).bool()
    assert float(group_norm(*arguments, epsilon=0.3)[0]) == pytest.approx(0.5 / (math.sqrt(0.5) + 0.3), rel=1e-12)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_a_group_of_one_and_equal_rewards_have_advantage_exactly_zero(kind: str, count: int) -> None:
    # 0.1 + 0.2 is one of the numbers whose mean rounds to another, so the std comes out above 0.
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((count,), 0.1 + 0.2, dtype=dtype)
        assert not FUNCTIONS[kind](rewards, torch.zeros(count).long(), torch.ones(count).bool()).any()


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_response_that_is_not_trained_on_moves_no_advantage(kind: str) -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 1e9, math.nan]), torch.zeros(4, dtype=torch.int64)
    valid = torch.tensor([True, True, False, False])
    with_others, without = FUNCTIONS[kind](rewards, groups, valid), FUNCTIONS[kind](rewards[:2], groups[:2], valid[:2])
    assert with_others.tolist() == [*without.tolist(), 0.0, 0.0]
    assert without.tolist() == pytest.approx({"rloo": [1.0, -1.0], "group_mean": [0.5, -0.5]}.get(kind, without))


@given(masks, discounts, st.floats(0.0, 1.0), st.integers(0, 99))
def test_gae_counts_only_the_trained_tokens(mask: list[list[bool]], gamma: float, lam: float, seed: int) -> None:
    batch = step(mask, seed=seed).batch
    trained, rewards = batch.response_mask, batch.log_probs_old
    poison = torch.full_like(rewards, math.nan)
    values = torch.where(trained, batch.values_old, poison)
    advantages, returns = gae(torch.where(trained, rewards, poison), values, trained, gamma, lam)
    for r, v, got, goal in zip(*(ragged(x, trained) for x in (rewards, batch.values_old, advantages, returns))):
        expected = equations.gae(r, v, gamma, lam)
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert goal == pytest.approx([a + value for a, value in zip(expected, v)], rel=1e-9, abs=1e-9)
    assert not advantages[~trained].any() and not returns[~trained].any()


@given(masks, discounts, st.integers(0, 99))
def test_rewards_to_go(mask: list[list[bool]], gamma: float, seed: int) -> None:
    batch = step(mask, seed=seed).batch
    trained = batch.response_mask
    got = rewards_to_go(batch.log_probs_old.masked_fill(~trained, math.nan), trained, gamma)
    for rewards, row in zip(ragged(batch.log_probs_old, trained), ragged(got, trained)):
        assert row == pytest.approx(equations.rewards_to_go(rewards, gamma), rel=1e-9, abs=1e-9)
    assert not got[~trained].any()


@given(masks, st.integers(0, 99), st.sampled_from([1e-6, 1.0, 1e4]))
def test_whitening_is_over_the_tokens_of_the_step(mask: list[list[bool]], seed: int, scale: float) -> None:
    batch = step(mask, seed=seed).batch
    trained, advantages = batch.response_mask, batch.log_probs_old * scale
    got = whiten(advantages.masked_fill(~trained, math.nan), trained, alone)
    for row, expected in zip(ragged(got, trained), equations.whiten(ragged(advantages, trained))):
        assert row == pytest.approx(expected, rel=1e-7, abs=1e-7)
    assert not got[~trained].any()


@pytest.mark.parametrize("values", [[], [3.0], [0.1 + 0.2] * 7])
def test_whitening_what_does_not_vary_is_exactly_zero(values: list[float]) -> None:
    mask = torch.arange(8) < len(values)
    advantages = torch.zeros(1, 8).double()
    advantages[0, : len(values)] = torch.tensor(values, dtype=torch.float64)
    assert whiten(advantages, mask[None], alone).tolist() == [[0.0] * 8]


@given(st.integers(0, 99), st.floats(-3, 3), st.floats(0.1, 10))
def test_whitened_advantages_are_the_same_for_rewards_of_any_scale(seed: int, shift: float, scale: float) -> None:
    batch = step(seed=seed).batch
    got = [whiten(a, batch.response_mask, alone) for a in (batch.values_old, batch.values_old * scale + shift)]
    torch.testing.assert_close(got[1], got[0], rtol=1e-5, atol=1e-5)


def test_an_advantage_of_ones_own_says_what_is_missing() -> None:
    class Mine(Advantage):
        pass

    batch = step().batch
    with pytest.raises(NotImplementedError, match="Mine must define __call__"):
        Mine()(batch, torch.zeros_like(batch.log_probs_old))
    assert repr(Mine()).endswith("Mine")
