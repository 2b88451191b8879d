"""The tokens of highest entropy carry the policy loss; what lies outside the mask has no say in which they are."""

from __future__ import annotations

import math

import pytest
import torch
from algorithms.steps import alone, loss_of, masks, ragged, step
from hypothesis import given
from hypothesis import strategies as st

from lightrft.algorithms import Algorithm, top_entropy_mask


def quantile(values: list[float], q: float) -> float:
    """Interpolated linearly between the two nearest."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


@given(masks, st.integers(0, 99), st.floats(0.01, 1.0))
def test_tokens_at_or_above_the_quantile_of_the_step_are_kept(mask: list[list[bool]], seed: int, p: float) -> None:
    batch = step(mask, seed=seed).batch
    trained, entropy = batch.response_mask, batch.entropy_old
    kept = top_entropy_mask(entropy.masked_fill(~trained, math.nan), trained, p, alone)
    step_values = entropy[trained].tolist()
    bound = quantile(step_values, 1 - p) if step_values else 0.0
    for row, got in zip(ragged(entropy, trained), ragged(kept, trained)):
        # What is nearer to the bound than rounding counts as at it.
        assert [g for g, e in zip(got, row) if abs(e - bound + 1e-5) > 1e-9] == [
            e >= bound - 1e-5 for e in row if abs(e - bound + 1e-5) > 1e-9
        ]
    assert not kept[~trained].any()


@pytest.mark.parametrize(("fraction", "kept"), [(0.01, [4]), (0.5, [3, 4]), (0.6, [2, 3, 4]), (1.0, [0, 1, 2, 3, 4])])
def test_the_token_at_the_quantile_is_kept(fraction: float, kept: list[int]) -> None:
    entropy, mask = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 5).bool()
    found = entropy[top_entropy_mask(entropy, mask, fraction, alone)].tolist()
    # Of five, the 0.5 quantile is the third, the 0.4 quantile lies between the second and the third.
    assert found == ([2, 3, 4] if fraction == 0.5 else kept)


def test_equal_entropies_are_all_kept_and_no_token_keeps_none() -> None:
    entropy, mask = torch.full((2, 3), 0.1 + 0.2), torch.ones(2, 3).bool()
    assert top_entropy_mask(entropy, mask, 0.2, alone).all()
    assert not top_entropy_mask(entropy, ~mask, 0.2, alone).any()


def test_entropies_that_differ_by_rounding_share_their_fate() -> None:
    # The first tokens of a group: one context, computed in two micro-batches. The quantile falls among them.
    entropy, mask = torch.tensor([[1.5, 3.0], [1.5 + 2e-6, 0.5]]), torch.ones(2, 2).bool()
    for fraction in (0.5, 0.6, 0.7):
        assert top_entropy_mask(entropy, mask, fraction, alone).tolist() == [[True, True], [True, False]]


def test_a_dropped_token_stays_in_the_denominator_and_keeps_its_kl() -> None:
    batch = step(((True, True, True, True),), [0]).batch
    batch.rewards, batch.advantages = torch.ones(1), torch.ones(1, 4).double()
    batch.entropy_old = torch.tensor([[1.0, 4.0, 2.0, 3.0]], dtype=torch.float64)
    algorithm = Algorithm(top_entropy_fraction=0.5, kl="loss_k2", kl_coefficient=0.5)
    metrics = algorithm._weigh(batch, alone)
    assert batch.policy_weights.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert metrics == {"token_filter/kept_fraction": 0.5}
    # Two of four tokens have loss -1; the KL of 0.1 nats is that of all four.
    log_probs = batch.log_probs_old
    batch.log_probs_reference = log_probs - 0.1
    assert loss_of(algorithm, batch, log_probs) == pytest.approx(-2 / 4 + 0.5 * 0.1**2 / 2)


def test_a_dropped_token_stays_in_the_ratio_of_its_sequence() -> None:
    batch = step(((True, True),), [0]).batch
    batch.advantages, batch.policy_weights = torch.ones(1, 2).double(), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    algorithm = Algorithm("gspo_token", clip_high=9.0, top_entropy_fraction=0.5)
    log_probs = batch.log_probs_old + torch.tensor([[0.8, 0.2]])
    assert loss_of(algorithm, batch, log_probs) == pytest.approx(-math.exp((0.8 + 0.2) / 2) / 2)
