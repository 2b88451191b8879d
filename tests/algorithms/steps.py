"""Optimizer steps to test on: ragged, with holes and empty rows, off policy, away from the reference, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms import Algorithm, StepTotals
from lightrft.samples import Batch

LONGEST = 10
Mask = Sequence[Sequence[bool]]

# Ragged, a hole in the middle, a hole at the start, a single token, nothing, all.
ROWS: Mask = (
    (True, True, True, False, False),
    (True, False, True, True, False),
    (False, True, False, True, True),
    (False, False, True, False, False),
    (False, False, False, False, False),
    (True, True, True, True, True),
)
PAIRS = (0, 0, 1, 1, 2, 2)  # the group of the empty row is a group of one

masks = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=6)
)
NAMES = ("log_probs_rollout", "log_probs_old", "log_probs_reference", "entropy_old", "values_old", "advantages")


class Step(NamedTuple):
    """A whole optimizer step, and what the policy in training says of its tokens."""

    batch: Batch
    log_probs: Tensor
    entropy: Tensor
    totals: StepTotals


def step(mask: Mask = ROWS, groups: Sequence[int] | None = None, seed: int = 0, **changes: Any) -> Step:
    """Random log-probs around -1.5, rewards in {-1, 0, 0.5, 1}, one advantage a response; 0 outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    trained = torch.tensor(mask, dtype=torch.bool)
    count = len(trained)

    def noise(mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(trained.shape, generator=generator, dtype=torch.float64) * std + mean

    def rewards() -> Tensor:
        return torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64)[torch.randint(4, (count,), generator=generator)]

    lengths = [max([t + 1 for t, on in enumerate(row) if on], default=0) for row in mask]
    batch = Batch(
        sequences=[torch.arange(2 + length) for length in lengths],
        prompt_lengths=torch.full((count,), 2),
        response_mask=trained,
        group_ids=torch.tensor([i // 2 for i in range(count)] if groups is None else list(groups)),
        rewards=rewards(),
        log_probs_rollout=noise(-1.5, 0.4) * trained,
        log_probs_old=noise(-1.5, 0.4) * trained,
        log_probs_reference=noise(-1.5, 0.4) * trained,
        entropy_old=noise(2.0, 0.5) * trained,
        values_old=noise() * trained,
        greedy_rewards=rewards(),
        advantages=noise()[:, :1] * trained,
        returns=noise() * trained,
        policy_weights=trained.double(),
    )
    for name, value in changes.items():
        setattr(batch, name, value)
    return Step(batch, noise(-1.5, 0.4) * trained, noise(2.0, 0.5) * trained, totals_of(trained))


def totals_of(mask: Tensor) -> StepTotals:
    return StepTotals(int(mask.sum()), int(mask.any(-1).sum()), LONGEST)


def literal(mask: Mask, **rows: Any) -> Batch:
    """A batch with the numbers that are given, by name, for each row or token; the rest as :class:`Batch` has it."""
    kinds = {"truncated": torch.bool, "comparable": torch.bool, "group_ids": torch.int64}
    given = {name: torch.tensor(value, dtype=kinds.get(name, torch.float64)) for name, value in rows.items()}
    trained = torch.tensor(mask, dtype=torch.bool)
    zeros = torch.zeros(trained.shape, dtype=torch.float64)
    needed = {
        "group_ids": torch.zeros(len(trained), dtype=torch.int64),
        "rewards": zeros[:, 0],
        "log_probs_rollout": zeros,
        "log_probs_old": zeros,
    }
    return Batch(
        sequences=[torch.arange(2 + len(row)) for row in mask],
        prompt_lengths=torch.full((len(trained),), 2),
        response_mask=trained,
        **{**needed, **given},
    )


def loss_of(algorithm: Algorithm, batch: Batch, log_probs: Any = 0.0, entropy: float = 0.0) -> float:
    """The loss of a whole step; ``log_probs`` for each token, or one number for all."""
    new = torch.as_tensor(log_probs, dtype=torch.float64).expand(batch.response_mask.shape)
    loss, _ = algorithm.loss(new, torch.full_like(new, entropy), batch, totals_of(batch.response_mask))
    return float(loss)


def ragged(values: Tensor, mask: Tensor) -> list[list[float]]:
    """The values at each response's trained tokens, in their order."""
    return [row[on].tolist() for row, on in zip(values.expand(mask.shape), mask)]


def flat(values: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in values for value in row]


def alone(values: Tensor) -> Tensor:
    """The gather of a single rank."""
    return values


def parts_of(rows: int, cuts: Sequence[int]) -> list[list[int]]:
    """``rows`` cut at the given places."""
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < rows}), rows]
    return [list(range(start, end)) for start, end in itertools.pairwise(bounds)]


def summed(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """A step's metrics from those of its parts, as the learner joins them."""
    return {
        name: (max if name.endswith("max") else math.fsum)(float(part[name]) for part in parts) for name in parts[0]
    }
