"""Sequences shared out so that ranks wait little: every one once, within budgets, and close to the best there is."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightrft.ops import CostModel, busiest_over_mean, loads, micro_steps, partition, split_by_tokens

COST = CostModel(0.01)
Case = tuple[list[int], int, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Lengths, groups and budget."""
    lengths = draw(st.lists(st.integers(1, 100), max_size=40))
    return lengths, draw(st.integers(1, 5)), draw(st.integers(1, 250))


def planned(case: Case) -> list[list[list[int]]]:
    lengths, groups, budget = case
    return micro_steps([COST(length) for length in lengths], lengths, groups, budget)


@settings(max_examples=200)
@given(cases())
def test_every_row_goes_once_to_a_micro_batch_within_the_budget(case: Case) -> None:
    lengths, groups, budget = case
    steps = planned(case)
    parts = [part for step in steps for part in step]
    assert steps and all(len(step) == groups for step in steps)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in part) <= budget or len(part) == 1 for part in parts)
    assert steps == planned(case)


@settings(max_examples=200)
@given(cases())
def test_never_more_steps_nor_more_waiting_than_the_split_by_tokens(case: Case) -> None:
    lengths, groups, budget = case
    steps = planned(case)
    greedy = sorted(
        (sum(COST(lengths[row]) for row in part) for part in split_by_tokens(lengths, budget)), reverse=True
    )
    assert len(steps) <= max(1, math.ceil(len(greedy) / groups))
    waiting = sum(max(costs) for costs in loads([COST(length) for length in lengths], steps))
    assert waiting <= sum(greedy[::groups]) * (1 + 1e-8)


@given(cases())
def test_micro_batches_of_like_cost_run_at_the_same_time(case: Case) -> None:
    costs = loads([COST(length) for length in case[0]], planned(case))
    assert all(min(step) >= max(after) * (1 - 1e-9) for step, after in itertools.pairwise(costs))


def test_waiting_is_close_to_the_least_that_there_is() -> None:
    generator = random.Random(0)
    over = []
    for _ in range(40):
        lengths = [generator.randint(5, 100) for _ in range(7)]
        costs, budget = [COST(length) for length in lengths], 150
        steps = micro_steps(costs, lengths, 2, budget)
        best = min(
            sum(sorted((sum(costs[row] for row in part) for part in parts), reverse=True)[::2])
            for parts in _all_ways(7, 2 * len(steps))
            if all(sum(lengths[row] for row in part) <= budget or len(part) < 2 for part in parts)
        )
        over.append(sum(map(max, loads(costs, steps))) / best - 1)
    assert min(over) >= -1e-9 and max(over) < 0.12 and sum(over) / len(over) < 0.015


def test_bins_are_close_to_the_best_and_on_average_better_than_karmarkar_and_karps() -> None:
    generator = random.Random(0)
    ours, theirs = [], []
    for bins, count in itertools.product((2, 3), (6, 8)):
        for _ in range(15):
            costs = [float(generator.randint(10, 1000)) for _ in range(count)]
            best = min(_largest(costs, parts) for parts in _all_ways(count, bins))
            ours.append(_largest(costs, _parted(costs, bins)) / best - 1)
            theirs.append(_largest(costs, _differenced(costs, bins)) / best - 1)
    assert min(ours) >= -1e-9 and max(ours) < 0.1 and sum(ours) / len(ours) < 0.01
    assert sum(ours) <= sum(theirs)


@pytest.mark.parametrize(("bins", "count"), [(8, 40), (16, 128), (64, 512)])
def test_with_many_rows_gaps_are_smaller_than_karmarkar_and_karps(bins: int, count: int) -> None:
    for seed in range(3):
        generator = random.Random(seed)
        costs = [generator.lognormvariate(8.0, 1.0) for _ in range(count)]
        ours, theirs = _largest(costs, _parted(costs, bins)), _largest(costs, _differenced(costs, bins))
        assert ours <= theirs


def _parted(costs: Sequence[float], bins: int) -> list[list[int]]:
    found = partition(costs, [1] * len(costs), [sum(costs) / bins] * bins, len(costs))
    assert found is not None
    return found


def _largest(costs: Sequence[float], parts: Sequence[Sequence[int]]) -> float:
    return max(sum(costs[row] for row in part) for part in parts)


def _all_ways(count: int, bins: int) -> Iterator[list[list[int]]]:
    """Every way to put rows into at most so many bins that are all alike."""
    parts: list[list[int]] = []

    def place(row: int) -> Iterator[list[list[int]]]:
        if row == count:
            yield parts
            return
        for part in list(parts):
            part.append(row)
            yield from place(row + 1)
            part.pop()
        if len(parts) < bins:
            parts.append([row])
            yield from place(row + 1)
            parts.pop()

    return place(0)


def _differenced(costs: Sequence[float], bins: int) -> list[list[int]]:
    """The largest differencing method (Karmarkar and Karp 1982), which knows no budget.

    Each row begins as a partition of its own; the two whose bins differ most become one, largest bin with smallest.
    """
    waiting = [(-cost, row, [(0.0, [])] * (bins - 1) + [(cost, [row])]) for row, cost in enumerate(costs)]
    heapq.heapify(waiting)
    for serial in itertools.count(len(costs)):
        _, _, left = heapq.heappop(waiting)
        if not waiting:
            return [rows for _, rows in left]
        _, _, right = heapq.heappop(waiting)
        joined = sorted((x + y, a + b) for (x, a), (y, b) in zip(left, reversed(right)))
        heapq.heappush(waiting, (joined[0][0] - joined[-1][0], serial, joined))
    raise AssertionError


def test_what_does_not_fit_is_not_placed() -> None:
    assert partition([1.0] * 3, [6] * 3, [1.5] * 2, 10) is None
    assert partition([1.0, 9.0], [1, 50], [5.0] * 2, 10) == [[1], [0]]


def test_long_rows_fill_micro_steps_of_their_own_up_to_the_longest() -> None:
    # Bins of equal cost would leave those of the long rows apart: 100, 90 | 60 ...; the short ones even them out.
    lengths = [100, 90, *[10] * 13]
    steps = micro_steps([float(length) for length in lengths], lengths, 2, 100)
    assert loads([float(length) for length in lengths], steps) == [[100, 100], [60, 60]]


def test_totals_of_groups_are_even_too() -> None:
    steps = micro_steps([10.0, 8.0, 6.0, 4.0], [10, 8, 6, 4], 2, 10)
    assert steps == [[[0], [1]], [[3], [2]]]


def test_a_group_without_rows_waits() -> None:
    assert micro_steps([], [], 3, 10) == [[[], [], []]]
    steps = micro_steps([3.0], [3], 3, 10)
    assert steps == [[[0], [], []]] and busiest_over_mean(loads([3.0], steps)) == 3.0
    assert busiest_over_mean([[0.0, 0.0]]) == 1.0
    assert busiest_over_mean([[4.0, 2.0], [1.0, 1.0]]) == 10 / 8


def test_many_rows_are_planned_at_once() -> None:
    """Scanning all micro-batches for each row, this took a minute."""
    generator = random.Random(0)
    lengths = [min(16384, int(generator.lognormvariate(8.3, 1.0)) + 16) for _ in range(4096)]
    costs = [CostModel(4e-5)(length) for length in lengths]
    steps = micro_steps(costs, lengths, 32, 17408)
    assert busiest_over_mean(loads(costs, steps)) < 1.01


def test_the_costs_weights_are_those_of_the_model() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 50}
    config = AutoConfig.for_model("qwen2", num_attention_heads=4, num_key_value_heads=2, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    cost = CostModel.of_shape(64, 3, 96, 4, 2, 16, 50)
    assert cost.attention == pytest.approx(3 * 64 / weights)
    assert cost(1000) == pytest.approx(1000 + cost.attention * 1e6)
