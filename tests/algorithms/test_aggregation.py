"""Weights of token losses are those of the four equations, and what weighs nothing adds exactly nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from algorithms import equations
from algorithms.steps import LONGEST, masks, ragged, step
from hypothesis import given
from hypothesis import strategies as st

from lightrft.algorithms import StepTotals, token_weights, weighted_sum

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm")


@pytest.mark.parametrize("how", AGGREGATIONS)
@given(masks, st.integers(0, 99))
def test_the_weighted_sum_is_the_aggregate(how: Any, mask: list[list[bool]], seed: int) -> None:
    batch, losses, _, totals = step(mask, seed=seed)
    got = weighted_sum(losses, token_weights(batch.response_mask, how, totals))
    expected = equations.aggregate(ragged(losses, batch.response_mask), how, LONGEST)
    assert float(got) == pytest.approx(expected, rel=1e-6, abs=1e-12)


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


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_a_step_without_a_trained_token_weighs_nothing(how: Any) -> None:
    weights = token_weights(torch.zeros(3, 2, dtype=torch.bool), how, StepTotals(0, 0, LONGEST))
    assert weights.tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_value_of_weight_zero_adds_exactly_zero_and_has_no_gradient(poison: float) -> None:
    values = torch.tensor([[2.0, poison]], requires_grad=True)
    total = weighted_sum(values, torch.tensor([[0.25, 0.0]]))
    total.backward()
    assert float(total.detach()) == 0.5 and values.grad.tolist() == [[0.25, 0.0]]


def test_one_value_for_a_response_counts_at_each_of_its_weights() -> None:
    values = torch.tensor([[2.0], [math.nan]], dtype=torch.float64)
    assert float(weighted_sum(values, torch.tensor([[0.25, 0.5], [0.0, 0.0]]))) == 1.5
