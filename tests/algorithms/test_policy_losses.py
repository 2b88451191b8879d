"""Each policy loss equals its equation in Python floats, its gradient the derivative, and no ratio overflows either."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from algorithms import equations
from algorithms.steps import Mask, masks, ragged, step
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms import (
    Objective,
    at_level,
    clipped_log_prob_loss,
    clipped_ratio_loss,
    clipped_weight_loss,
    difference,
    drift,
    geometric_loss,
    log_ratio,
    response_mean,
)

finite = st.floats(-50, 50, allow_nan=False)
advantage = st.floats(-3, 3).filter(lambda a: a == 0 or abs(a) > 1e-6)
low_bound, high_bound = st.floats(0.01, 0.9), st.floats(0.01, 5)
INF = math.inf


def clamped(new: float, old: float) -> float:
    """The log-ratio as it may be exponentiated."""
    return equations.clip(new - old, -20, 20)


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor([[value]], dtype=torch.float64) for value in values]


# --- differences and levels ------------------------------------------------------------------------------------------


@given(finite, finite)
def test_the_log_ratio_is_clamped_to_20_nats(new: float, old: float) -> None:
    assert float(difference(*tensors(new, old))) == new - old
    assert float(log_ratio(*tensors(new, old))) == clamped(new, old)


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [(-INF, -1.0, -9999.0), (-1.0, -INF, 9999.0), (-INF, -INF, 0.0), (-1e30, -1.0, -9999.0), (-1e30, -INF, 0.0)],
)
def test_an_impossible_token_is_very_unlikely(new: float, old: float, expected: float) -> None:
    leaf = torch.tensor([[new]], requires_grad=True)
    d = difference(leaf, torch.tensor([[old]]))
    d.sum().backward()
    assert float(d.detach()) == expected
    assert float(leaf.grad) == (new == -1.0)  # no gradient through what is impossible
    assert float(log_ratio(leaf, torch.tensor([[old]])).detach()) == equations.clip(expected, -20, 20)


def test_a_nan_is_not_taken_for_a_log_prob() -> None:
    """A reference or an engine that returns it is broken; its tokens must not count as equal to the policy's."""
    nan, one = torch.tensor([[math.nan]]), torch.zeros(1, 1)
    for d in (difference(nan, one), difference(one, nan), log_ratio(nan, one), log_ratio(one, nan)):
        assert d.isnan().all()


@given(masks, st.integers(0, 99))
def test_the_mean_of_a_response_is_over_its_trained_tokens(mask: Mask, seed: int) -> None:
    batch, values, _, _ = step(mask, seed=seed)
    got = response_mean(values.masked_fill(~batch.response_mask, math.nan), batch.response_mask)
    assert got[:, 0].tolist() == pytest.approx([equations.mean(r) for r in ragged(values, batch.response_mask)])


@given(masks, st.integers(0, 99))
def test_levels_of_the_ratio(mask: Mask, seed: int) -> None:
    batch, log_probs, _, _ = step(mask, seed=seed)
    trained, d = batch.response_mask, log_probs - batch.log_probs_old
    rows = ragged(d, trained)
    for level in ("token", "sequence", "sequence_token"):
        expected = rows if level == "token" else [[equations.mean(row)] * len(row) for row in rows]
        got = at_level(d, log_probs, trained, level)  # type: ignore[arg-type]
        for one, other in zip(ragged(got, trained), expected):
            assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("unlikely", [-1.0, -30.0, -INF])
def test_a_tokens_ratio_shows_its_sequences_to_the_last_bit_and_has_its_own_gradient(unlikely: float) -> None:
    """A rounding of 1e-3, as beside a log-prob of -1e4, would be more than GSPO's whole clip range."""
    log_probs = torch.tensor([[unlikely, -2.0]], requires_grad=True)
    d, mask = torch.tensor([[1e-4, 3e-4]]), torch.ones(1, 2).bool()
    got = at_level(d, log_probs, mask, "sequence_token")
    assert got.tolist() == [[float(response_mean(d, mask))] * 2]
    (gradient,) = torch.autograd.grad(got[0, 0], log_probs)
    assert gradient.tolist() == [[float(unlikely > -INF), 0.0]]


# --- token losses ----------------------------------------------------------------------------------------------------


@given(finite, finite, advantage, low_bound, high_bound, st.sampled_from([0.0, 1.5, 3.0]))
def test_clipped_ratio_loss(new: float, old: float, a: float, low: float, high: float, dual: float) -> None:
    ratio = math.exp(clamped(new, old))
    expected = equations.ratio_clip(ratio, a, low, high)
    if dual and a < 0:
        expected = min(expected, -dual * a)
    t = tensors(new, old, a)
    loss = clipped_ratio_loss(log_ratio(t[0], t[1]), t[2], low, high, dual)
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(finite, finite, advantage, low_bound, high_bound)
def test_clipped_log_prob_loss(new: float, old: float, a: float, low: float, high: float) -> None:
    d = clamped(new, old)
    expected = -min(d * a, equations.clip(d, math.log(1 - low), math.log(1 + high)) * a)
    t = tensors(new, old, a)
    got = clipped_log_prob_loss(log_ratio(t[0], t[1]), t[2], low, high)
    assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_log_prob_without_a_lower_bound_is_not_bounded() -> None:
    d, a = torch.tensor([[-20.0, 1.0]]), torch.tensor([[-1.0, -1.0]])
    assert clipped_log_prob_loss(d, a, 1.0, 0.2).tolist() == [[-20.0, 1.0]]


@given(finite, st.floats(-30, -1e-3), advantage, st.one_of(low_bound, st.just(1.0)), high_bound)
def test_clipped_weight_loss(d: float, new: float, a: float, low: float, high: float) -> None:
    weight = equations.clip(math.exp(clamped(d, 0.0)), 1 - low, 1 + high)
    t = tensors(clamped(d, 0.0), new, a)
    for one in t[:2]:
        one.requires_grad_()
    loss = clipped_weight_loss(t[0], t[1], t[2], low, high)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-weight * a * new, rel=1e-9, abs=1e-12)
    # The weight is a number: the gradient is that of the log-prob, at any ratio.
    assert float(t[1].grad) == pytest.approx(-weight * a, rel=1e-9) and t[0].grad is None


@given(masks, st.integers(0, 99), low_bound, high_bound, st.sampled_from([0.3, 3.0, 300.0]))
def test_geometric_loss(mask: Mask, seed: int, low: float, high: float, scale: float) -> None:
    batch, log_probs, _, _ = step(mask, seed=seed)
    trained, d = batch.response_mask, (scale * (log_probs - batch.log_probs_old)).clamp(-20, 20)
    got = geometric_loss(d.masked_fill(~trained, math.nan), batch.advantages, trained, low, high)
    for row, advantages, losses in zip(*(ragged(x, trained) for x in (d, batch.advantages, got))):
        sign = math.copysign(1.0, advantages[0]) if row else 0.0
        terms = [sign * min(sign * one, sign * equations.clip(one, -low, high)) for one in row]
        assert losses == pytest.approx([-math.exp(equations.mean(terms)) * a for a in advantages], rel=1e-9)


def test_without_an_advantage_the_geometric_loss_is_zero() -> None:
    d, mask = torch.tensor([[20.0, -20.0]]), torch.ones(1, 2).bool()
    assert not geometric_loss(d, torch.zeros(1, 2), mask, 0.4, 0.4).any()


@given(finite)
def test_drift(d: float) -> None:
    d = clamped(d, 0.0)
    assert float(drift(*tensors(d))) == pytest.approx(math.exp(d) - 1 - d, rel=1e-9, abs=1e-12)


# --- gradients -------------------------------------------------------------------------------------------------------

LOSSES: dict[str, Any] = {
    "clipped_ratio": lambda d, batch: clipped_ratio_loss(d, batch.advantages, 0.2, 0.3),
    "dual": lambda d, batch: clipped_ratio_loss(d, batch.advantages, 0.2, 0.3, 2.0),
    "clipped_log_prob": lambda d, batch: clipped_log_prob_loss(d, batch.advantages, 0.2, 0.3),
    "sequence": lambda d, batch: clipped_ratio_loss(
        at_level(d, d, batch.response_mask, "sequence"), batch.advantages, 0.2, 0.3
    ),
    "geometric": lambda d, batch: geometric_loss(d, batch.advantages, batch.response_mask, 0.2, 0.3),
    "drift": lambda d, batch: drift(d),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_equals_finite_differences(name: str, seed: int) -> None:
    batch, log_probs, _, _ = step(seed=seed)
    leaf = log_probs.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return (LOSSES[name](log_ratio(x, batch.log_probs_old), batch) * batch.response_mask).sum()

    assert torch.autograd.gradcheck(loss, (leaf,), eps=1e-7, atol=1e-5)
    assert torch.autograd.grad(loss(leaf), leaf)[0].any()


@pytest.mark.parametrize("objective", [clipped_ratio_loss, clipped_log_prob_loss])
@pytest.mark.parametrize(
    ("ratio", "a", "moves"),
    [(1.3, 1.0, True), (1.5, 1.0, False), (1.5, -1.0, True), (0.95, -1.0, True), (0.8, -1.0, False), (0.8, 1.0, True)],
)
def test_beyond_its_bound_a_ratio_has_no_gradient_where_the_advantage_pushes_on(
    objective: Any, ratio: float, a: float, moves: bool
) -> None:
    d, advantages = tensors(math.log(ratio), a)
    objective(d.requires_grad_(), advantages, 0.1, 0.4).backward()
    assert bool(d.grad.any()) is moves


def test_beyond_the_dual_bound_a_bad_token_has_no_gradient() -> None:
    for ratio, moves in ((2.9, True), (3.1, False)):
        d, advantages = tensors(math.log(ratio), -1.0)
        clipped_ratio_loss(d.requires_grad_(), advantages, 0.2, 0.2, 3.0).backward()
        assert bool(d.grad.any()) is moves


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("new", "old"), [(-INF, -1.0), (-1.0, -INF), (-INF, -INF), (1e4, 0.0), (-1e4, 0.0)])
def test_no_ratio_overflows_a_loss_or_its_gradient(name: str, new: float, old: float) -> None:
    batch, log_probs, _, _ = step()
    log_probs[0, 1], batch.log_probs_old[0, 1] = new, old
    leaf = log_probs.float().requires_grad_()
    loss = LOSSES[name](log_ratio(leaf, batch.log_probs_old.float()), batch) * batch.response_mask
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(leaf.grad).all()


def test_an_objective_of_ones_own_says_what_is_missing() -> None:
    class Mine(Objective):
        pass

    batch, log_probs, _, _ = step()
    with pytest.raises(NotImplementedError, match="Mine must define __call__"):
        Mine()(log_probs, batch)
    assert repr(Mine()).endswith("Mine")
