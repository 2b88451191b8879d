"""What is prepared for a step (advantages, returns, masks, weights) is the page's, on any number of ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from algorithms import equations
from algorithms.steps import LONGEST, PAIRS, ROWS, Mask, alone, flat, masks, ragged, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms import PRESETS, Advantage, Algorithm
from lightrft.samples import Batch

PREPARED = ("advantages", "returns", "policy_weights", "response_mask", "rewards")


# --- each algorithm's advantages -------------------------------------------------------------------------------------


def broadcast(of_responses: Sequence[float], mask: Tensor) -> equations.Rows:
    return [[a] * int(on.sum()) for a, on in zip(of_responses, mask)]


def by_group(kind: str) -> Callable[[Batch], equations.Rows]:
    def advantages(batch: Batch) -> equations.Rows:
        lengths = batch.response_mask.sum(-1).tolist()
        found = equations.group_advantages(kind, batch.rewards.tolist(), batch.group_ids.tolist(), lengths)
        return broadcast(found, batch.response_mask)

    return advantages


def with_kl(batch: Batch, beta: float | None = None) -> equations.Rows:
    """Rewards of tokens; ``beta`` weighs a k1 in them."""
    rows = (ragged(tensor, batch.response_mask) for tensor in (batch.log_probs_old, batch.log_probs_reference))
    return equations.token_rewards(batch.rewards.tolist(), *rows, beta or 0.0, "k1" if beta else None)


def rloo(batch: Batch) -> equations.Rows:
    """R <- R - beta sum_t k1; minus the mean of the others."""
    rewards = [math.fsum(row) for row in with_kl(batch, 0.03)]
    lengths = batch.response_mask.sum(-1).tolist()
    found = equations.group_advantages("rloo", rewards, batch.group_ids.tolist(), lengths)
    return broadcast(found, batch.response_mask)


def remax(batch: Batch) -> equations.Rows:
    """Reward-to-go with its KL, minus the greedy response's reward without."""
    rows = [equations.rewards_to_go(row, 1.0) for row in with_kl(batch, 0.05)]
    return [[a - greedy for a in row] for row, greedy in zip(rows, batch.greedy_rewards.tolist())]


def unwhitened_ppo(batch: Batch) -> equations.Rows:
    values = ragged(batch.values_old, batch.response_mask)
    return [equations.gae(r, v, 1.0, 0.95) for r, v in zip(with_kl(batch, 0.02), values)]


ADVANTAGES: dict[str, Callable[[Batch], equations.Rows]] = {
    **dict.fromkeys(["grpo", "dapo", "gspo", "gspo_token", "gmpo", "cispo"], by_group("group_norm")),
    **dict.fromkeys(["dr_grpo", "cpgd"], by_group("group_mean")),
    "reinforce": lambda batch: broadcast(batch.rewards.tolist(), batch.response_mask),
    "reinforce_plus_plus": lambda batch: equations.whiten(
        [equations.rewards_to_go(row, 1.0) for row in with_kl(batch, 0.01)]
    ),
    "reinforce_plus_plus_baseline": lambda batch: equations.whiten(by_group("group_mean")(batch)),
    "rloo": rloo,
    "remax": remax,
    "ppo": lambda batch: equations.whiten(unwhitened_ppo(batch)),
}


def test_every_preset_has_its_advantage_here() -> None:
    assert set(ADVANTAGES) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
@given(masks, st.integers(0, 99))
def test_the_advantages_of_a_preset_are_its_equation(preset: Any, mask: Mask, seed: int) -> None:
    batch = step(mask, seed=seed).batch
    expected = ADVANTAGES[preset](batch)
    metrics = Algorithm(preset).prepare(batch, alone)
    for got, row in zip(ragged(batch.advantages, batch.response_mask), expected):
        assert got == pytest.approx(row, rel=1e-6, abs=1e-6)
    assert not batch.advantages[~batch.response_mask].any()
    assert torch.equal(batch.policy_weights, batch.response_mask.to(batch.policy_weights))
    tokens = flat(expected)
    assert metrics["advantage/mean"] == pytest.approx(equations.mean(tokens), rel=1e-6, abs=1e-6)
    spread = math.sqrt(equations.mean([(a - equations.mean(tokens)) ** 2 for a in tokens]))
    assert metrics["advantage/std"] == pytest.approx(spread, rel=1e-6, abs=1e-6)


@given(masks, st.integers(0, 99))
def test_a_critic_learns_the_returns_before_whitening(mask: Mask, seed: int) -> None:
    batch = step(mask, seed=seed).batch
    metrics = Algorithm("ppo").prepare(batch, alone)
    values = ragged(batch.values_old, batch.response_mask)
    expected = [[a + v for a, v in zip(*rows)] for rows in zip(unwhitened_ppo(batch), values)]
    for got, row in zip(ragged(batch.returns, batch.response_mask), expected):
        assert got == pytest.approx(row, rel=1e-6, abs=1e-6)
    assert not batch.returns[~batch.response_mask].any()
    if len(flat(expected)) > 1:
        errors = [g - v for g, v in zip(flat(expected), flat(values))]
        explained = 1 - equations.std(errors) ** 2 / equations.std(flat(expected)) ** 2
        assert metrics["value/explained_variance"] == pytest.approx(explained, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_kl_in_the_reward_takes_its_weight_of_the_day(kind: str) -> None:
    batch = step().batch
    algorithm = Algorithm("reinforce", kl=f"reward_{kind}", gamma=0.9)  # type: ignore[arg-type]
    algorithm.kl_coefficient = 0.7
    algorithm.prepare(batch, alone)
    rows = [ragged(x, batch.response_mask) for x in (batch.log_probs_old, batch.log_probs_reference)]
    rewards = equations.token_rewards(batch.rewards.tolist(), *rows, 0.7, kind)
    for got, row in zip(ragged(batch.advantages, batch.response_mask), rewards):
        assert got == pytest.approx(equations.rewards_to_go(row, 0.9), rel=1e-6)


def test_an_advantage_of_ones_own_sees_the_rewards_of_tokens() -> None:
    class Immediate(Advantage):
        def __call__(self, batch: Batch, token_rewards: Tensor) -> Tensor:
            return 2 * token_rewards

    batch = step(((True, False, True),), [0]).batch
    Algorithm("reinforce", advantage=Immediate()).prepare(batch, alone)
    assert batch.advantages.tolist() == [[0.0, 0.0, 2 * float(batch.rewards)]]


# --- masks -----------------------------------------------------------------------------------------------------------


def test_truncated_responses_count_in_their_group_but_are_not_trained_on() -> None:
    for preset, whitened in (("grpo", False), ("reinforce_plus_plus_baseline", True)):
        batch = step(groups=PAIRS, truncated=torch.tensor([False, True, False, False, False, False])).batch
        batch.rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 0.0, 0.0])
        rows = ADVANTAGES["grpo" if not whitened else "dr_grpo"](batch)
        rows[1] = []  # type: ignore[index]
        Algorithm(preset, mask_truncated=True).prepare(batch, alone)  # type: ignore[arg-type]
        assert not batch.response_mask[1].any() and not batch.policy_weights[1].any()
        expected = equations.whiten(rows) if whitened else rows
        for got, row in zip(ragged(batch.advantages, batch.response_mask), expected):
            assert got == pytest.approx(row, rel=1e-6, abs=1e-6)


def test_groups_of_equal_rewards_are_taken_out_by_the_verifiers_reward() -> None:
    batch = step(groups=PAIRS, rewards=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])).batch
    algorithm = Algorithm(group_filter="drop", overlong_buffer_fraction=0.9)
    rewards = batch.rewards
    algorithm.shape_rewards(batch, 6, alone)
    algorithm.filter_groups(batch, rewards)
    # The penalty tells the first two apart, but not the verifier; the last group has one member that is trained on.
    assert batch.rewards[0] != batch.rewards[1]
    assert batch.response_mask.any(-1).tolist() == [False, False, True, True, False, False]
    untouched = step(groups=PAIRS).batch
    Algorithm().filter_groups(untouched, untouched.rewards)
    assert torch.equal(untouched.response_mask, torch.tensor(ROWS))


# --- ranks -----------------------------------------------------------------------------------------------------------


class Ranks:
    """Runs a function on shares of a batch at the same time, with a gather that joins them in the order of ranks."""

    def __init__(self, batch: Batch, shares: Sequence[Sequence[int]]) -> None:
        self.parts = [batch.select(rows) for rows in shares]
        self.barrier = threading.Barrier(len(shares), timeout=60)
        self.held: list[Tensor] = [torch.empty(0)] * len(shares)

    def gather(self, rank: int) -> Callable[[Tensor], Tensor]:
        def joined(values: Tensor) -> Tensor:
            assert values.dim() == 1
            self.held[rank] = values
            self.barrier.wait()
            found = torch.cat(self.held)
            self.barrier.wait()
            return found

        return joined

    def run(self, prepare: Callable[[int, Batch, Any], dict[str, float]]) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{}] * len(self.parts)

        def one(rank: int) -> None:
            try:
                found[rank] = prepare(rank, self.parts[rank], self.gather(rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def joined(self, name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in self.parts])


def whole_step(algorithm: Algorithm, batch: Batch, gather: Any) -> dict[str, float]:
    rewards = batch.rewards
    algorithm.shape_rewards(batch, LONGEST, gather)
    algorithm.filter_groups(batch, rewards)
    return algorithm.prepare(batch, gather)


def options_of(preset: str) -> dict[str, Any]:
    """All that looks at the whole step, where it goes with the preset."""
    single = preset in ("reinforce", "remax", "ppo", "reinforce_plus_plus")
    whole = preset in ("gspo", "gmpo")
    return {
        "whiten": True,
        "correction": "sequence_tis",
        "normalize_rewards": True,
        "clip_rewards": 2.0,
        "group_filter": "none" if single else "drop",
        "top_entropy_fraction": 1.0 if whole else 0.4,
        "mask_truncated": True,
    }


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=20)
@given(masks, st.integers(0, 99), st.booleans(), st.integers(1, 3))
def test_two_ranks_prepare_what_one_does(preset: Any, mask: Mask, seed: int, optional: bool, cut: int) -> None:
    rows = len(mask)
    edge = min(2 * cut, rows)  # between groups; the second rank may have nothing
    options = options_of(preset) if optional else {}
    truncated = torch.arange(rows) % 3 == 2
    single, undivided = Algorithm(preset, **options), step(mask, seed=seed, truncated=truncated).batch
    expected = whole_step(single, undivided, alone)
    ranks = Ranks(step(mask, seed=seed, truncated=truncated).batch, [range(edge), range(edge, rows)])
    algorithms = [Algorithm(preset, **options) for _ in range(2)]
    metrics = ranks.run(lambda rank, part, gather: whole_step(algorithms[rank], part, gather))
    for name in PREPARED:
        torch.testing.assert_close(ranks.joined(name), getattr(undivided, name), rtol=1e-9, atol=1e-9)
    for found, algorithm in zip(metrics, algorithms):
        assert found == {name: pytest.approx(value, rel=1e-9, abs=1e-9) for name, value in expected.items()}
        assert algorithm.state_dict() == single.state_dict()


def test_ranks_that_do_not_gather_would_be_seen() -> None:
    undivided = step().batch
    Algorithm("reinforce_plus_plus").prepare(undivided, alone)
    part = step().batch.select([0, 1])
    Algorithm("reinforce_plus_plus").prepare(part, alone)
    assert float((part.advantages - undivided.advantages[:2]).abs().max()) > 0.05


# --- the edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_what_lies_outside_the_mask_changes_nothing(preset: Any) -> None:
    results = []
    for poison in (0.0, math.nan, math.inf):
        batch = step().batch
        outside = ~batch.response_mask
        for name in ("log_probs_old", "log_probs_reference", "log_probs_rollout", "values_old", "entropy_old"):
            setattr(batch, name, getattr(batch, name).masked_fill(outside, poison))
        batch.rewards, batch.greedy_rewards = (
            x.masked_fill(outside.all(-1), poison) for x in (batch.rewards, batch.greedy_rewards)
        )
        metrics = whole_step(Algorithm(preset, **options_of(preset)), batch, alone)
        names = ("advantages", "policy_weights", "response_mask")
        results.append((metrics, *(getattr(batch, name).tolist() for name in names), batch.returns[~outside].tolist()))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("preset", PRESETS)
def test_groups_of_one_and_equal_rewards_are_defined(preset: Any) -> None:
    """Exactly 0 where a group is compared, before whitening and, as nothing varies, after it too."""
    for groups in (range(6), PAIRS):
        batch = step(groups=list(groups), rewards=torch.full((6,), 0.1 + 0.2)).batch
        batch.log_probs_reference = batch.log_probs_old.clone()  # no KL, which could tell them apart
        Algorithm(preset).prepare(batch, alone)
        assert torch.isfinite(batch.advantages).all()
        if Algorithm(preset).needs_groups:
            assert not batch.advantages.any()
