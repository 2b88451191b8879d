"""The critic's loss and what is shown of it equal their equations, also where a bound takes the gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from algorithms import equations
from algorithms.steps import LONGEST, masks, parts_of, ragged, step, summed
from hypothesis import given
from hypothesis import strategies as st

from lightrft.algorithms import Algorithm, explained_variance, value_loss
from lightrft.lightning_modules import CriticModule

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm")


def token_loss(value: float, old: float, goal: float, bound: float) -> float:
    """max((V - G)^2, (clip(V, V_old +- bound) - G)^2) / 2."""
    if not bound:
        return (value - goal) ** 2 / 2
    return max((value - goal) ** 2, (equations.clip(value, old - bound, old + bound) - goal) ** 2) / 2


@given(*[st.floats(-5, 5)] * 3, st.sampled_from([0.0, 0.2, 1.5]))
def test_value_loss(value: float, old: float, goal: float, bound: float) -> None:
    tensors = [torch.tensor([[x]], dtype=torch.float64) for x in (value, old, goal)]
    assert float(value_loss(*tensors, bound)) == pytest.approx(token_loss(value, old, goal, bound), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bound", [0.0, 0.2, 1.5])
def test_the_gradient_equals_finite_differences(bound: float) -> None:
    batch, values, _, _ = step()
    leaf = values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, batch.values_old, batch.returns, bound).sum(), (leaf,))


def test_a_value_beyond_its_bound_has_no_gradient_where_it_would_move_on() -> None:
    for value, goal, moves in ((1.0, 2.0, True), (1.0, -2.0, True), (0.1, 2.0, True), (-1.0, -2.0, True)):
        leaf = torch.tensor([[value]], requires_grad=True)
        value_loss(leaf, torch.zeros(1, 1), torch.tensor([[goal]]), 0.2).backward()
        # The larger error counts: beyond the bound, that of the clipped value where the value itself is nearer.
        clipped = (equations.clip(value, -0.2, 0.2) - goal) ** 2 > (value - goal) ** 2
        assert bool(leaf.grad.any()) is (moves and not clipped)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_the_loss_of_a_step_is_aggregated_as_the_policys(how: Any, bound: float) -> None:
    batch, values, _, totals = step()
    loss, metrics = Algorithm("ppo", aggregation=how).value_loss(values, batch, totals, bound)
    rows = list(zip(*(ragged(x, batch.response_mask) for x in (values, batch.values_old, batch.returns))))
    losses = [[token_loss(*token, bound) for token in zip(*row)] for row in rows]
    assert float(loss) == pytest.approx(equations.aggregate(losses, how, LONGEST), rel=1e-6)
    assert float(metrics["value/loss"]) == float(loss)
    tokens = [(v, o) for row in rows for v, o in zip(row[0], row[1])]
    assert float(metrics["value/mean"]) == pytest.approx(equations.mean([v for v, _ in tokens]), rel=1e-6)
    if bound:
        moved = equations.mean([abs(v - o) > bound for v, o in tokens])
        assert float(metrics["value/clip_fraction"]) == pytest.approx(moved, rel=1e-6)
    else:
        assert "value/clip_fraction" not in metrics


@given(masks, st.lists(st.integers(1, 5), max_size=3), st.sampled_from(AGGREGATIONS), st.sampled_from([0.0, 0.5]))
def test_parts_of_a_step_sum_to_the_whole(mask: list[list[bool]], cuts: list[int], how: Any, bound: float) -> None:
    batch, values, _, totals = step(mask)
    algorithm = Algorithm("ppo", aggregation=how)
    whole, metrics = algorithm.value_loss(values, batch, totals, bound)
    found = [
        algorithm.value_loss(values[rows], batch.select(rows), totals, bound) for rows in parts_of(len(mask), cuts)
    ]
    assert float(sum(loss for loss, _ in found)) == pytest.approx(float(whole), rel=1e-12, abs=1e-12)
    expected = {name: pytest.approx(float(value), rel=1e-6, abs=1e-12) for name, value in metrics.items()}
    assert summed([part for _, part in found]) == expected


def test_the_critics_bound_is_the_one_that_counts() -> None:
    critic = CriticModule(config={"model_type": "qwen2"}, value_clip=0.3)
    batch, _, _, totals = step(((True,),), [0])
    batch.values_old, batch.returns = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    values = torch.tensor([[0.8]], dtype=torch.float64)
    loss, metrics = Algorithm("ppo").value_loss(values, batch, totals, critic.value_clip)
    assert float(loss) == pytest.approx((0.3 - 1) ** 2 / 2) and float(metrics["value/clip_fraction"]) == 1


def test_what_lies_outside_the_mask_changes_nothing() -> None:
    results = []
    for poison in (0.0, math.nan):
        batch, values, _, totals = step()
        outside = ~batch.response_mask
        batch.values_old, batch.returns = (x.masked_fill(outside, poison) for x in (batch.values_old, batch.returns))
        leaf = values.masked_fill(outside, poison).requires_grad_()
        loss, metrics = Algorithm("ppo").value_loss(leaf, batch, totals, 0.2)
        loss.backward()
        numbers = {name: float(value) for name, value in metrics.items()}
        results.append((float(loss.detach()), numbers, leaf.grad[batch.response_mask].tolist()))
    assert results[0] == results[1]


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), max_size=9))
def test_explained_variance(pairs: list[tuple[float, float]]) -> None:
    pairs = [(round(v, 2), round(g, 2)) for v, g in pairs]
    values, goals = [v for v, _ in pairs], [g for _, g in pairs]
    expected = 0.0
    if len(set(goals)) > 1:
        expected = 1 - equations.std([g - v for v, g in pairs]) ** 2 / equations.std(goals) ** 2
    got = explained_variance(torch.tensor(values, dtype=torch.float64), torch.tensor(goals, dtype=torch.float64))
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
