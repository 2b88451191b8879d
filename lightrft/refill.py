"""Dynamic sampling (DAPO, arXiv 2503.14476): further prompts in place of those whose responses all earned the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightrft.analysis import groups_with_spread
from lightrft.samples import Rollout

if TYPE_CHECKING:
    from lightrft.trainer import RFTTrainer


@dataclass(frozen=True)
class _Group:
    """A prompt and its responses, as a rollout of one prompt.

    Attributes:
        order: (round, share, rank, place): where the prompt stands in the order in which all ranks drew.
        spread: whether its rewards differ.
    """

    order: tuple[int, int, int, int]
    spread: bool
    rollout: Rollout


def refill(trainer: RFTTrainer, rollout: Rollout, score: Callable[[Rollout], None]) -> tuple[Rollout, dict[str, float]]:
    """Sample further prompts until ``prompts_per_iteration`` groups have rewards that differ, or no round is left.

    A round draws as many whole updates' prompts as are missing. Groups are taken in the order in which they were drawn
    and shared out anew, so what is trained on does not depend on the number of ranks. Where groups are still missing
    after the last round, groups of equal rewards, which are not trained on, keep the place of the missing ones.

    Args:
        trainer: in its phase ``score``.
        rollout: this rank's scored rollout of the iteration.
        score: scores a further rollout in place.

    Returns:
        this rank's share of the groups; metrics ``refill/rounds``, ``refill/prompts`` and ``refill/missing_groups``.
    """
    sharding, wanted = trainer.learner.sharding, trainer.prompts_per_iteration
    prompts_per_update = trainer.prompts_per_update
    shares = wanted // prompts_per_update
    groups = _groups(rollout, 0, trainer.fabric.global_rank, shares)
    rounds, drawn = 0, 0

    def missing() -> int:
        found = torch.tensor(float(sum(group.spread for group in groups)))
        return max(0, wanted - int(sharding.over_ranks(found, "sum")))

    while (count := missing()) and rounds < trainer.model.algorithm.refill_rounds:
        rounds += 1
        updates = math.ceil(count / prompts_per_update)
        more = updates * prompts_per_update
        drawn += more
        extra = trainer.sample(more)
        score(extra)
        groups += _groups(extra, rounds, trainer.fabric.global_rank, updates)
    if rounds:
        # What each rank drew is told first, so that only the groups that are taken travel.
        known = sorted(place for part in sharding.everyone([_place(group) for group in groups]) for place in part)
        taken = set(known[:wanted])
        moving = [group for part in sharding.everyone([g for g in groups if _place(g) in taken]) for group in part]
        rollout = _joined(_share(moving, shares, trainer.fabric.global_rank, trainer.fabric.world_size), rollout)
    if count:
        rank_zero_warn(
            f"Iteration {trainer.progress.iteration + 1}: {count} of {wanted} groups still have equal rewards after "
            f"refill_rounds={rounds} and are not trained on; raise it, or give prompts that are neither too easy nor "
            "too hard."
        )
    metrics = {"rounds": rounds, "prompts": drawn, "missing_groups": count}
    return rollout, {f"refill/{name}": float(value) for name, value in metrics.items()}


def _groups(rollout: Rollout, number: int, rank: int, shares: int) -> list[_Group]:
    """The groups of this rank's rollout; ``shares`` times, this rank drew one block of equal size."""
    block = len(rollout.prompts) // shares
    return [
        _Group(
            (number, place // block, rank, place),
            spread,
            Rollout([prompt], [group], rollout.sampling, rollout.greedy[place : place + 1]),
        )
        for place, (prompt, group, spread) in enumerate(
            zip(rollout.prompts, rollout.groups, groups_with_spread(rollout))
        )
    ]


def _place(group: _Group) -> tuple[bool, tuple[int, int, int, int]]:
    """By which groups are taken: those with spread first, in the order of their draw."""
    return not group.spread, group.order


def _share(groups: list[_Group], shares: int, rank: int, world_size: int) -> list[_Group]:
    """This rank's part of every update's share of the groups that were taken."""
    in_order = sorted(groups, key=_place)
    size = len(in_order) // shares
    mine = size // world_size
    if in_order[-1].spread:
        parts = [in_order[i * size : (i + 1) * size] for i in range(shares)]
        return [group for part in parts for group in part[rank * mine : (rank + 1) * mine]]
    # Groups are missing: every update, and every rank, misses as many.
    return [group for i in range(shares) for group in in_order[i::shares][rank::world_size]]


def _joined(groups: list[_Group], like: Rollout) -> Rollout:
    parts = [group.rollout for group in groups]
    return Rollout(
        [prompt for part in parts for prompt in part.prompts],
        [group for part in parts for group in part.groups],
        like.sampling,
        [greedy for part in parts for greedy in part.greedy],
    )
