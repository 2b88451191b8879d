"""How a strategy lays one model over ranks, in numbers: what a plan of memory needs to know, before there are ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["weights", "gradients", "optimizer"]


@dataclass(frozen=True)
class Placement:
    """What each rank holds of a model, and what it needs for a time.

    Attributes:
        weight_shards, gradient_shards, optimizer_shards: ranks that share one copy of each; 1 is a copy for every rank.
        on_host: parts that lie in host memory.
        compute_bytes: of a weight as a forward reads it, where the strategy casts it; ``None`` is as it lies at rest
            (autocast may still copy it).
        casts_at_rest: the weights themselves lie in ``compute_bytes``, float32 ones beside the optimizer (ZeRO).
        gathers: weights are made whole for computing, beside what each rank holds of them.
        gathered_parameters: most parameters that are whole at a time; ``None`` is a unit at a time: the outermost, the
            one that computes, the next one, and the buffer through which it comes.
        gradient_copies: further copies of the whole gradient (DDP's buckets).
        buffer_bytes: fixed buffers through which gradients are reduced.
    """

    weight_shards: int = 1
    gradient_shards: int = 1
    optimizer_shards: int = 1
    on_host: frozenset[Part] = frozenset()
    compute_bytes: int | None = None
    casts_at_rest: bool = False
    gathers: bool = False
    gathered_parameters: int | None = None
    gradient_copies: int = 0
    buffer_bytes: int = 0
