"""The ranks over which one engine lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.engines.base import EngineError
from lightrft.engines.flat import Flat, flatten, flatten_requests, unflatten, unflatten_requests
from lightrft.ops.collectives import everyone
from lightrft.samples import Prompt, Response


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
        """The prompts of all ranks, in their order, with their seeds, and which of them are this rank's.

        Of the prompts what an engine needs: ids, uid and media. They travel as tensors.
        """
        if self.size == 1:
            return list(prompts), list(map(list, seeds)), slice(0, len(prompts))
        parts = [unflatten_requests(part) for part in self._gather(flatten_requests(prompts, seeds))]
        start = sum(len(asked) for asked, _ in parts[: self.rank])
        asked = [prompt for part, _ in parts for prompt in part]
        return asked, [own for _, part in parts for own in part], slice(start, start + len(prompts))

    def from_first(self, groups: Sequence[Sequence[Response]] | None) -> list[list[Response]]:
        """On every rank the groups of responses that the first one has, where it alone sampled; as tensors.

        Args:
            groups: the first rank's; what the others give is not looked at.
        """
        if self.size == 1:
            return [list(group) for group in groups or ()]
        own = (groups or ()) if self.rank == 0 else ()
        flat = flatten([response for group in own for response in group])
        flat["counts"] = torch.tensor([len(group) for group in own], dtype=torch.int64)
        sizes = self.first(torch.tensor([len(tensor) for tensor in flat.values()]))
        for (name, tensor), size in zip(flat.items(), sizes.tolist()):
            flat[name] = self.first(tensor if self.rank == 0 else tensor.new_empty(size))
        responses = iter(unflatten(flat))
        return [[next(responses) for _ in range(count)] for count in flat["counts"].tolist()]

    def _gather(self, flat: Flat) -> list[Flat]:
        """What each rank gives, whose tensors may have any length: one collective for lengths, one for all bytes."""
        sizes = self._all(torch.tensor([tensor.nbytes for tensor in flat.values()]))
        longest = max(int(size.sum()) for size in sizes)
        own = torch.cat([tensor.view(torch.uint8) for tensor in flat.values()])
        buffers = self._all(torch.cat([own, own.new_zeros(longest - len(own))]))
        parts = [buffer[: size.sum()].split(size.tolist()) for buffer, size in zip(buffers, sizes)]
        # Cloned, since a view as wider numbers must begin at a multiple of their width.
        return [{name: raw.clone().view(flat[name].dtype) for name, raw in zip(flat, part)} for part in parts]

    def _all(self, values: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=self._ranks)
        return parts

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
        return torch.cat(self._all(values), dim=-1)
