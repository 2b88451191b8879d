"""The order in which prompts are drawn: endless, resumable, and the same for any number of ranks."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from lightrft.samples import Prompt


class Prompts(Protocol):
    """What a stream draws from (:class:`~lightrft.data.prompt_set.PromptSet`)."""

    name: str

    def __len__(self) -> int: ...

    def prompt(self, index: int, draw: str) -> Prompt: ...


class PromptStream:
    """Draws prompts without end.

    Without probabilities all sets are one pool, and every epoch goes through it once, in an order of (seed, epoch).
    With probabilities every set is a pool of its own: draw ``k`` picks the pool from (seed, ``k``) and takes the next
    of that pool. Nothing depends on the number of ranks or on how many are taken at a time.

    Args:
        sets: what is drawn from.
        probabilities: share of each set in the draws (normalised here); ``None`` for one pool.
        seed: seed of the order.
        shuffle: ``False`` goes through a pool in the order of its records.
        rank: which share of a draw :meth:`take` returns.
        world_size: number of shares.
    """

    def __init__(
        self,
        sets: Sequence[Prompts],
        probabilities: Sequence[float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._pools = [_Pool(sets, seed, shuffle)]
        if probabilities is not None:
            self._pools = [_Pool([one], seed, shuffle) for one in sets]
        self._weights = list(probabilities or [1.0])
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._drawn = 0
        self._counts = [0] * len(self._pools)
        self._identity = {
            "sources": [[one.name, len(one)] for one in sets],
            "blended": probabilities is not None,
            "seed": seed,
            "shuffle": shuffle,
        }

    def __len__(self) -> int:
        """Records of an epoch, all ranks together."""
        return sum(map(len, self._pools))

    def take(self, n_global: int) -> list[Prompt]:
        """Draw the next ``n_global`` prompts of the global order; returns this rank's, ``n_global / world_size``.

        Rank ``r`` gets the ``r``-th of ``world_size`` equal consecutive blocks.

        Raises:
            ValueError: ``n_global`` does not divide by the number of ranks; nothing is drawn.
        """
        share, rest = divmod(n_global, self._world_size)
        if rest or n_global < 0:
            raise ValueError(
                f"{n_global} prompts cannot be divided evenly among {self._world_size} ranks; take a multiple of it."
            )
        draws = [self._draw() for _ in range(n_global)]
        mine = draws[self._rank * share : (self._rank + 1) * share]
        return [self._pools[pool].prompt(count) for pool, count in mine]

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, and of which data: the same on every rank."""
        return {"drawn": self._drawn, "counts": list(self._counts), **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a stream stood, on any number of ranks.

        Raises:
            ValueError: the stream drew from other sources, or in another order; names the difference.
        """
        changed = [
            f"{key} {state.get(key)} there, {now} here" for key, now in self._identity.items() if state.get(key) != now
        ]
        if changed:
            raise ValueError(
                f"The checkpoint's prompts were drawn otherwise ({'; '.join(changed)}); "
                "resume with the data and seed of the checkpoint, or start a new run."
            )
        self._drawn, self._counts = int(state["drawn"]), [int(count) for count in state["counts"]]

    def _draw(self) -> tuple[int, int]:
        pool = 0
        if len(self._pools) > 1:
            # Seeding with text hashes it, which is the same in every process and version.
            (pool,) = random.Random(f"{self._seed}/{self._drawn}").choices(range(len(self._pools)), self._weights)
        count = self._counts[pool]
        self._counts[pool] += 1
        self._drawn += 1
        return pool, count


class _Pool:
    """Sets one after another, gone through epoch by epoch."""

    def __init__(self, sets: Sequence[Prompts], seed: int, shuffle: bool) -> None:
        self._sets = list(sets)
        self._ends = list(accumulate(map(len, sets)))
        self._key = f"{seed}/{'+'.join(one.name for one in sets)}"
        self._shuffle = shuffle
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def prompt(self, count: int) -> Prompt:
        """The ``count``-th draw from this pool."""
        epoch, position = divmod(count, len(self))
        index = int(self._permutation(epoch)[position]) if self._shuffle else position
        which = bisect_right(self._ends, index)
        start = self._ends[which - 1] if which else 0
        return self._sets[which].prompt(index - start, str(epoch))

    def _permutation(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            seed = random.Random(f"{self._key}/{epoch}").getrandbits(63)
            self._order = epoch, torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._order[1]
