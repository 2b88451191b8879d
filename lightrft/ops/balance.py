"""Balance: what a sequence costs, and sequences shared out to micro-batches that cost the same.

Ranks that shard a model wait for each other in every micro-step (one micro-batch of each group of ranks), so the time
of an update is the sum over micro-steps of the dearest micro-batch. That sum is what is made small.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from lightrft.ops.packing import fewest_parts, split_by_tokens

# A gap between two micro-batches is not worth closing by less than this share of the mean.
_WORTH = 1e-4
# How many of the micro-batches with most room the fullest one tries to exchange with.
_PARTNERS = 8


@dataclass(frozen=True)
class CostModel:
    """Cost of a packed sequence, in units of what the linear layers cost one token: ``L + attention * L**2``.

    Derived from the count of floating-point operations; ``docs/balance.md`` compares it with measured times.

    Attributes:
        attention: of a pair of tokens.
    """

    attention: float

    @classmethod
    def of_shape(
        cls,
        hidden_size: int,
        layers: int,
        intermediate_size: int,
        heads: int,
        key_value_heads: int,
        head_size: int,
        vocabulary: int,
    ) -> CostModel:
        """Of a decoder with gated MLPs and causal attention.

        A token costs 2 operations a weight: the projections, the three matrices of the MLP and the head. A sequence of
        ``L`` tokens costs ``2 * 2 * L**2 / 2`` a layer for each number of a query: scores and values, half of them
        masked. The backward multiplies both by nearly the same.

        Args:
            intermediate_size: of the MLP; of all experts that a token visits.
        """
        queries = heads * head_size
        projections = 2 * hidden_size * (queries + key_value_heads * head_size)
        weights = layers * (projections + 3 * hidden_size * intermediate_size) + hidden_size * vocabulary
        return cls(layers * queries / weights)

    def __call__(self, length: int) -> float:
        return length + self.attention * length * length


def micro_steps(costs: Sequence[float], sizes: Sequence[int], groups: int, budget: int) -> list[list[list[int]]]:
    """Share sequences out to micro-batches of ``groups`` of ranks that work at the same time.

    The fewest micro-steps that :func:`partition` finds room in, unless the token-even split of
    :func:`lightrft.ops.split_by_tokens` waits less. Of a micro-step the dearest micro-batch goes to the group that has
    had least so far.

    Args:
        costs: of each sequence.
        sizes: tokens of each.
        groups: of ranks.
        budget: most tokens in a micro-batch; a single longer sequence gets one of its own.

    Returns:
        ``[step][group]`` indices of sequences, ascending; at least one step, dearest first. Where there are fewer
        sequences than places, some are empty. Deterministic, so that every rank finds the same.
    """
    by_tokens = split_by_tokens(sizes, budget) or [[]]
    choices = [_in_steps(by_tokens, costs, groups)]
    for steps in range(max(1, -(-fewest_parts(sizes, budget) // groups)), len(choices[0]) + 1):
        parts = partition(costs, sizes, _targets(costs, groups, steps), budget)
        if parts is not None:
            choices.insert(0, _in_steps(parts, costs, groups))
            break
    # Rounded, so that between equals the fewest steps are taken.
    return min(choices, key=lambda steps: round(busiest_over_mean(loads(costs, steps)), 9))


def loads(costs: Sequence[float], steps: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    """``[step][group]`` costs of what :func:`micro_steps` returned."""
    return [[sum(costs[row] for row in rows) for rows in step] for step in steps]


def busiest_over_mean(loads: Sequence[Sequence[float]]) -> float:
    """Time of the update over the time it would take if no group waited in any micro-step; at least 1.

    Args:
        loads: ``[step][group]`` costs.
    """
    total = sum(map(sum, loads))
    return sum(map(max, loads)) * len(loads[0]) / total if total else 1.0


def _in_steps(parts: list[list[int]], costs: Sequence[float], groups: int) -> list[list[list[int]]]:
    """Micro-batches of like cost in one micro-step: no other order waits less."""
    ordered = sorted((-sum(costs[row] for row in part), sorted(part)) for part in parts)
    totals, steps = [0.0] * groups, []
    for start in range(0, len(ordered), groups):
        step: list[list[int]] = [[] for _ in range(groups)]
        waiting = sorted(range(groups), key=lambda group: totals[group])
        for group, (load, part) in zip(waiting, ordered[start : start + groups]):
            step[group] = part
            totals[group] -= load
        steps.append(step)
    return steps


def _targets(costs: Sequence[float], groups: int, steps: int) -> list[float]:
    """What each micro-batch should cost, dearest micro-step first.

    The mean, unless the longest sequences alone cost more: the micro-steps that they fill are then filled up to their
    dearest, and the others share the rest.
    """
    dearest = sorted(costs, reverse=True)[::groups][:steps]
    rest, targets = sum(costs) / groups, []
    for step, least in enumerate(dearest + [0.0] * (steps - len(dearest))):
        target = max(least, rest / (steps - step))
        rest -= target
        targets += [target] * groups
    return targets


def partition(
    costs: Sequence[float], sizes: Sequence[int], targets: Sequence[float], budget: int
) -> list[list[int]] | None:
    """Share items out to bins so that no bin's cost exceeds its target by much more than another's.

    The dearest item first, to the bin that lacks most (Graham 1969, bounds on multiprocessing timing anomalies); then
    the fullest bin gives an item, or exchanges one, as long as that brings two bins together. Within budgets it leaves
    smaller gaps than the differencing of Karmarkar and Karp (1982), which knows none (``tests/ops/test_balance.py``).

    Args:
        costs: of each item, at least 0.
        sizes: of each item.
        targets: of each bin; equal ones make bins of equal cost.
        budget: largest sum of sizes in a bin; a single larger item gets a bin of its own.

    Returns:
        indices of each bin; ``None`` where not all items were placed.
    """
    bins = _Bins(costs, sizes, targets, budget)
    if not bins.fill():
        return None
    bins.exchange()
    return bins.parts


class _Bins:
    """Bins with what they hold and the excess of its cost over their target."""

    def __init__(self, costs: Sequence[float], sizes: Sequence[int], targets: Sequence[float], budget: int) -> None:
        self.costs, self.sizes, self.budget = costs, sizes, budget
        self.worth = _WORTH * sum(costs) / max(len(targets), 1)
        self.parts: list[list[int]] = [[] for _ in targets]
        self.size = [0] * len(targets)
        self.excess = [-target for target in targets]

    def fill(self) -> bool:
        """Place every item, the dearest first; whether all found room."""
        lacking = [(excess, number) for number, excess in enumerate(self.excess)]
        heapq.heapify(lacking)
        aside: list[tuple[int, int]] = []  # by room: the bins that were too small for an item before
        for item in sorted(range(len(self.costs)), key=lambda item: (-self.costs[item], item)):
            while aside and self._has_room(aside[0][1], self.sizes[item]):
                _, number = heapq.heappop(aside)
                heapq.heappush(lacking, (self.excess[number], number))
            while lacking and not self._has_room(lacking[0][1], self.sizes[item]):
                _, number = heapq.heappop(lacking)
                heapq.heappush(aside, (self.size[number], number))
            if not lacking:
                return False
            number = lacking[0][1]
            self.parts[number].append(item)
            self.size[number] += self.sizes[item]
            self.excess[number] += self.costs[item]
            heapq.heapreplace(lacking, (self.excess[number], number))
        return True

    def _has_room(self, number: int, size: int) -> bool:
        return not self.parts[number] or self.size[number] + size <= self.budget

    def exchange(self) -> None:
        """Bring the fullest bins and those that lack most together; each exchange makes the fuller of two less full."""
        order = sorted((excess, number) for number, excess in enumerate(self.excess))
        fullest = [(-excess, number) for excess, number in order]
        heapq.heapify(fullest)
        while fullest:
            excess, number = heapq.heappop(fullest)
            if -excess != self.excess[number]:
                continue  # it has changed since
            found = [best for _, other in order[:_PARTNERS] if (best := self._best(number, other))]
            if not found:
                continue
            _, other, given, taken = max(found, key=lambda best: best[0])
            for one in (number, other):
                del order[bisect_left(order, (self.excess[one], one))]
            self._move(number, other, given)
            if taken is not None:
                self._move(other, number, taken)
            for one in (number, other):
                insort(order, (self.excess[one], one))
                heapq.heappush(fullest, (-self.excess[one], one))

    def _best(self, number: int, other: int) -> tuple[float, int, int, int | None] | None:
        """``(by how much nearer, other, given, taken)``: what ``number`` best gives to ``other`` and takes from it."""
        gap = self.excess[number] - self.excess[other]
        best, least = None, self.worth
        for given in self.parts[number]:
            for taken in (None, *self.parts[other]):
                cost, size = self.costs[given], self.sizes[given]
                if taken is not None:
                    cost, size = cost - self.costs[taken], size - self.sizes[taken]
                nearer = gap - abs(gap - 2 * cost)
                if nearer > least and self._may_move(number, other, size, taken):
                    best, least = (nearer, other, given, taken), nearer
        return best

    def _may_move(self, number: int, other: int, size: int, taken: int | None) -> bool:
        """Whether both bins keep the budget, or hold one item only, when ``size`` more goes than comes."""
        alone = len(self.parts[other]) == (taken is not None)
        if self.size[other] + size > self.budget and not alone:
            return False
        return self.size[number] - size <= self.budget or len(self.parts[number]) == 1

    def _move(self, source: int, goal: int, item: int) -> None:
        for number, sign in ((source, -1), (goal, 1)):
            self.size[number] += sign * self.sizes[item]
            self.excess[number] += sign * self.costs[item]
        self.parts[source].remove(item)
        self.parts[goal].append(item)
