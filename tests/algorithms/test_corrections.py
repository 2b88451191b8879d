"""Off-policy weights equal their equations at each level, and stay finite and detached whatever the engine says."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from algorithms import equations
from algorithms.steps import ROWS, alone, loss_of, masks, ragged, step
from hypothesis import given
from hypothesis import strategies as st

from lightrft.algorithms import Algorithm, correction_weights, difference, effective_sample_size, response_weights
from lightrft.algorithms.corrections import BOUNDS, Correction

CORRECTIONS = [name for name in get_args(Correction) if name != "none"]


def expected_weights(x: list[float], kind: str, low: float, high: float) -> list[tuple[float, bool]]:
    """Weight of each token of one response, and whether a bound made it."""
    if kind.startswith("token"):
        ratios = [math.exp(equations.clip(one, -20, 20)) for one in x]
    else:
        one = math.fsum(x) if kind.startswith("sequence") else equations.mean(x)
        ratios = [math.exp(equations.clip(one, -20, 20))] * len(x)
    if kind.endswith("tis"):
        return [(min(ratio, high), ratio > high) for ratio in ratios]
    inside = [low <= ratio <= high for ratio in ratios]
    return [((r if kind.endswith("_ratio") else 1.0) if ok else 0.0, not ok) for r, ok in zip(ratios, inside)]


@pytest.mark.parametrize("kind", CORRECTIONS)
@given(masks, st.integers(0, 99), st.sampled_from([0.1, 1.0, 30.0]), st.floats(0.0, 0.99), st.floats(1.0, 9.0))
def test_weights_equal_their_equation(
    kind: str, mask: list[list[bool]], seed: int, scale: float, low: float, high: float
) -> None:
    batch = step(mask, seed=seed).batch
    trained = batch.response_mask
    x = scale * (batch.log_probs_old - batch.log_probs_rollout)
    weights, bounded = correction_weights(x.masked_fill(~trained, math.nan), trained, kind, low, high)
    assert weights.shape == bounded.shape == trained.shape
    for row, got, cut in zip(ragged(x, trained), ragged(weights, trained), ragged(bounded, trained)):
        expected = expected_weights(row, kind, low, high)
        assert got == pytest.approx([weight for weight, _ in expected], rel=1e-9)
        assert cut == [bound for _, bound in expected]


def test_each_level_has_its_own_bounds() -> None:
    assert set(CORRECTIONS) == set(BOUNDS) | {f"{name}_ratio" for name in BOUNDS if name.endswith("mask")}
    assert BOUNDS["token_tis"][1] == 2.0
    for kind in CORRECTIONS:
        assert Algorithm(correction=kind).correction_bounds == BOUNDS[kind.removesuffix("_ratio")]


@given(masks, st.integers(0, 99))
def test_a_loss_of_a_whole_response_is_weighted_by_the_geometric_mean(mask: list[list[bool]], seed: int) -> None:
    batch = step(mask, seed=seed).batch
    trained, weights = batch.response_mask, batch.values_old.abs()
    got = response_weights(weights.masked_fill(~trained, math.nan), trained)
    for row, means in zip(ragged(weights, trained), ragged(got, trained)):
        expected = math.prod(row) ** (1 / len(row)) if row else 0.0
        assert means == pytest.approx([expected] * len(row), rel=1e-9)


def test_a_response_that_is_masked_has_weight_exactly_zero() -> None:
    mask = torch.ones(1, 3).bool()
    assert response_weights(torch.zeros(1, 3), mask).tolist() == [[0.0] * 3]
    batch = step(log_probs_rollout=torch.full((6, 5), -9.0).double()).batch
    Algorithm("gspo", correction="sequence_mask").prepare(batch, alone)
    assert not batch.policy_weights.any()


@given(st.lists(st.floats(0, 5), max_size=9))
def test_effective_sample_size(weights: list[float]) -> None:
    weights = [0.0 if weight < 1e-3 else weight for weight in weights]  # whose squares do not vanish
    squares = math.fsum(weight**2 for weight in weights)
    expected = math.fsum(weights) ** 2 / (len(weights) * squares) if squares else 0.0
    assert effective_sample_size(torch.tensor(weights, dtype=torch.float64)) == pytest.approx(expected, rel=1e-9)


def test_the_step_shows_what_the_correction_did() -> None:
    batch = step(ROWS).batch
    metrics = Algorithm(correction="token_tis", correction_high=1.2).prepare(batch, alone)
    trained = batch.response_mask
    x = (batch.log_probs_old - batch.log_probs_rollout)[trained].tolist()
    weights = [min(math.exp(one), 1.2) for one in x]
    assert batch.policy_weights[trained].tolist() == pytest.approx(weights)
    assert metrics["correction/weight_mean"] == pytest.approx(equations.mean(weights))
    assert metrics["correction/bounded_fraction"] == pytest.approx(equations.mean([math.exp(one) > 1.2 for one in x]))
    size = sum(weights) ** 2 / len(weights) / sum(weight**2 for weight in weights)
    assert metrics["correction/effective_sample_size"] == pytest.approx(size)


@pytest.mark.parametrize("preset", ["grpo", "cpgd", "cispo", "gspo", "gspo_token", "gmpo"])
def test_the_policy_term_of_every_objective_is_weighted_and_nothing_else(preset: Any) -> None:
    kl = {} if preset == "grpo" else {"kl": "loss_k3"}
    algorithm = Algorithm(preset, entropy_bonus=0.1, **kl)
    batch, log_probs, entropy, totals = step()
    _, plain = algorithm.loss(log_probs, entropy, batch, totals)
    batch.policy_weights = batch.policy_weights / 2
    _, halved = algorithm.loss(log_probs, entropy, batch, totals)
    assert float(halved["policy_loss"]) == pytest.approx(float(plain["policy_loss"]) / 2)
    for name in {"kl_loss", "entropy_loss", "drift_loss"} & set(plain):
        assert float(halved[name]) == float(plain[name])


@pytest.mark.parametrize("preset", ["gspo", "gmpo"])
def test_the_loss_of_a_whole_response_is_weighted_once(preset: Any) -> None:
    batch, log_probs, _, _ = step(((True, True),), [0])
    batch.advantages = torch.ones(1, 2).double()
    x = torch.tensor([[0.1, 3.0]], dtype=torch.float64)  # truncated to ln 2
    batch.log_probs_rollout = batch.log_probs_old - x
    unweighted = loss_of(Algorithm(preset), batch, log_probs)
    algorithm = Algorithm(preset, correction="token_tis")
    algorithm._weigh(batch, alone)
    assert loss_of(algorithm, batch, log_probs) == pytest.approx(unweighted * math.exp((0.1 + math.log(2)) / 2))


def test_a_token_that_the_engine_drew_from_another_distribution_keeps_weight_one() -> None:
    """FIRE's hot first token; in a sequence's ratio it counts as one that is right."""
    for kind, expected in (("token_tis", [1.0, 2.0]), ("sequence_tis", [2.0] * 2), ("token_mask", [1.0, 0.0])):
        batch = step(((True, True),), [0]).batch
        batch.comparable = torch.tensor([[False, True]])
        batch.log_probs_rollout = batch.log_probs_old - torch.tensor([[-5.0, 3.0]])
        Algorithm(correction=kind).prepare(batch, alone)  # type: ignore[arg-type]
        assert batch.policy_weights.tolist() == [expected]


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_impossible_tokens_have_finite_weights(kind: str) -> None:
    inf = math.inf
    old = torch.tensor([[-inf, -1.0, -inf, -1.0]])
    rollout = torch.tensor([[-1.0, -inf, -inf, -1.0]])
    mask = torch.ones(1, 4).bool()
    weights, _ = correction_weights(difference(old, rollout), mask, kind, *BOUNDS[kind.removesuffix("_ratio")])
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    if kind == "token_tis":
        assert weights.tolist() == [pytest.approx([math.exp(-20), 2.0, 1.0, 1.0])]
