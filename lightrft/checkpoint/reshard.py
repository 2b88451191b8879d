"""The loop's state of a run on other ranks: what each had is dealt out anew.

Between iterations it is the same on every rank but for the random generators. Inside one, each rank has rows of the
rollout and of the batch: of every update's share one block, the blocks in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from lightrft.samples import Batch

if TYPE_CHECKING:
    from lightrft.trainer import RFTTrainer

T = TypeVar("T")


def resharded(states: list[dict[str, Any]], trainer: RFTTrainer) -> dict[str, Any]:
    """This rank's state, made of those of all ranks of the run that wrote them.

    Random generators of a rank that did not exist then stay as the run's seed sets them.
    """
    rank, ranks = trainer.fabric.global_rank, trainer.fabric.world_size
    state = dict(states[rank]) if rank < len(states) else {**states[0], "random": None}
    if state["samples"]:
        state["samples"] = _samples([one["samples"] for one in states], trainer.shares_per_iteration, rank, ranks)
    if state["batch"]:
        state["batch"] = _batch([one["batch"] for one in states], trainer.shares_per_iteration, rank, ranks)
    state["callbacks"] = {
        callback.state_key: callback.reshard([one["callbacks"][callback.state_key] for one in states], rank, ranks)
        for callback in trainer.callbacks
        if callback.state_key in state["callbacks"]
    }
    return state


def _samples(parts: list[dict[str, Any]], shares: int, rank: int, ranks: int) -> dict[str, Any]:
    return {
        name: _dealt([part[name] for part in parts], shares, rank, ranks) if isinstance(first, list) else first
        for name, first in parts[0].items()
    }


def _batch(parts: list[dict[str, Any]], shares: int, rank: int, ranks: int) -> dict[str, Any]:
    whole = _joined([Batch.from_state_dict(part) for part in parts])
    numbers = torch.arange(len(whole)).split([len(part["sequences"]) for part in parts])
    return whole.select(_dealt([one.tolist() for one in numbers], shares, rank, ranks)).state_dict()


def _dealt(parts: Sequence[Sequence[T]], shares: int, rank: int, ranks: int) -> list[T]:
    """This rank's block of every share of what lay in the ranks' ``parts``."""
    mine: list[T] = []
    for share in range(shares):
        whole = [one for part in parts for one in _block(part, share, shares)]
        mine += _block(whole, rank, ranks)
    return mine


def _block(items: Sequence[T], number: int, count: int) -> Sequence[T]:
    size = len(items) // count
    return items[number * size : (number + 1) * size]


def _joined(batches: list[Batch]) -> Batch:
    """The rows of all, padded to the longest; groups of different batches stay different."""
    longest = max(batch.response_mask.shape[1] for batch in batches)
    start = 0
    for batch in batches:
        batch.group_ids = batch.group_ids + start
        start = int(batch.group_ids.max()) + 1

    columns: dict[str, Any] = {
        name: torch.cat([_padded(batch.columns[name], longest) for batch in batches]) for name in batches[0].columns
    }
    return Batch(sequences=[one for batch in batches for one in batch.sequences], **columns)


def _padded(values: Tensor, longest: int) -> Tensor:
    """Zeros (what is outside every response's mask) to the right of ``[B, T]``; ``[B]`` as it is."""
    return functional.pad(values, (0, longest - values.shape[1])) if values.ndim == 2 else values
