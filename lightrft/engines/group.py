"""The ranks over which one engine lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.engines.base import EngineError
from lightrft.ops.collectives import everyone
from lightrft.samples import Prompt


class EngineGroup:
    """Contiguous ranks that hold one engine together: group ``g`` is ranks ``g * size`` to ``g * size + size - 1``.

    All ranks of a group call each of the engine's methods with the same arguments; groups work independently of each
    other. A group of one is the rank itself, which talks to nobody.

    Args:
        size: ranks a group. Above 1, the constructor is collective over all ranks of the run.

    Attributes:
        rank: of this process within its group.

    Raises:
        EngineError: the run's ranks cannot be divided into such groups.
    """

    def __init__(self, size: int = 1) -> None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if size < 1 or world_size % size:
            raise EngineError(
                f"An engine with tensor_parallel_size={size} lies over {size} ranks, and this run's {world_size} "
                "cannot be divided into such groups; choose a divisor of the number of ranks."
            )
        self.size = size
        self.rank = 0
        if size > 1:
            self._ranks: dist.ProcessGroup = dist.new_subgroups(size)[0]
            self.rank = self._ranks.rank()

    def everyone(self, item: Any) -> list[Any]:
        """What every rank of the group gives, in their order. Pickled, so for small things."""
        return [item] if self.size == 1 else everyone(item, self._ranks)

    def join(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]
    ) -> tuple[list[Prompt], list[list[int]], slice]:
        """The prompts of all ranks, in their order, with their seeds, and which of them are this rank's. Pickled."""
        parts = self.everyone((list(prompts), list(map(list, seeds))))
        start = sum(len(asked) for asked, _ in parts[: self.rank])
        asked = [prompt for part, _ in parts for prompt in part]
        return asked, [own for _, part in parts for own in part], slice(start, start + len(prompts))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the group, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self._ranks)
        return values

    def first(self, values: Tensor) -> Tensor:
        """The tensor of the group's first rank, in place of every rank's own."""
        if self.size > 1:
            dist.broadcast(values, group_src=0, group=self._ranks)
        return values

    def concatenate(self, values: Tensor) -> Tensor:
        """Parts of equal shape, joined along their last dimension in the order of ranks."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=self._ranks)
        return torch.cat(parts, dim=-1)
