"""Where rows are computed: micro-batches of like cost for every rank, of rows that other ranks may own.

A rank owns the rows that it sampled, whole groups of them, and does with them what compares responses. Forward and
backward are done where they balance best: rows travel there, and what a model said of them travels back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightrft.ops import busiest_over_mean, loads, micro_steps
from lightrft.samples import Batch
from lightrft.strategies import Layout, Sharding


@dataclass(frozen=True)
class _Row:
    """A row with something to train on.

    Attributes:
        owner: rank that sampled it.
        row: in the owner's batch.
        tokens: of prompt and response.
        response: tokens of the response.
    """

    owner: int
    row: int
    tokens: int
    response: int


class Workload:
    """The rows of a batch that have a trained token, shared out to micro-batches. The constructor is collective.

    Args:
        batch: the rows that this rank owns, on the host.
        cost: of a sequence of so many tokens.
        tokens_per_microbatch: most tokens of a micro-batch on one rank; a longer row is alone.
        layout: groups of ranks; a group's micro-batch holds as many times the tokens, on each of its ranks.
        sharding: reaches the other ranks.

    Attributes:
        micro_batches: this group's, on the host, as many as every other's, so that collectives inside a forward keep
            step; where a group has too few rows, some are one token that is not trained on. ``group_ids`` are the
            owners'.
        busiest_over_mean: predicted time over that of work without waiting
            (:func:`lightrft.ops.busiest_over_mean`); the same on every rank.
    """

    def __init__(
        self,
        batch: Batch,
        cost: Callable[[int], float],
        tokens_per_microbatch: int,
        layout: Layout,
        sharding: Sharding,
    ) -> None:
        self._batch, self._layout, self._sharding = batch, layout, sharding
        self._ranks = range(layout.world_size)
        self._rows = _all_rows(batch, sharding)
        costs, sizes = [cost(row.tokens) for row in self._rows], [row.tokens for row in self._rows]
        plan = micro_steps(costs, sizes, layout.groups, tokens_per_microbatch * layout.sequence_parallel_size)
        self.busiest_over_mean = busiest_over_mean(loads(costs, plan))
        group_of = {number: group for step in plan for group, part in enumerate(step) for number in part}
        self._groups = [group_of[number] for number in range(len(self._rows))]
        self._parts = [[self._rows[number] for number in step[layout.group]] for step in plan]
        held, place = self._fetch(), {row: index for index, row in enumerate(self._of_group(layout.group))}
        self.micro_batches = [
            held.select([place[row] for row in part]) if part else _nothing(batch) for part in self._parts
        ]

    def _of_group(self, group: int) -> list[_Row]:
        """Rows that a group computes, in the order of their owners and there of the rows."""
        return [row for row, computed_by in zip(self._rows, self._groups) if computed_by == group]

    def _fetch(self) -> Batch:
        """The rows of this rank's group."""
        layout, sent = self._layout, []
        for group in range(layout.groups):
            mine = [row.row for row in self._of_group(group) if row.owner == layout.rank]
            sent += [_flat(self._batch.select(mine))] * layout.sequence_parallel_size
        wanted = self._of_group(layout.group)
        expected = [_counts([row for row in wanted if row.owner == rank], self._batch) for rank in self._ranks]
        received = _exchange(self._sharding, sent, expected)
        return _batch([torch.cat(parts) for parts in zip(*received)], wanted, self._batch)

    def collect(self, found: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What a model said of the rows that this rank owns, wherever it was computed. Collective.

        Args:
            found: of each of :attr:`micro_batches`, ``K`` tensors ``[b, T]``.

        Returns:
            ``K`` tensors ``[B, T]`` like the batch's log-probs, 0 for a row without a trained token.
        """
        layout, like, kinds = self._layout, self._batch.log_probs_rollout, range(len(found[0]))
        said = {
            row: [values[place, : row.response].to(like) for values in values_of_part]
            for part, values_of_part in zip(self._parts, found)
            for place, row in enumerate(part)
        }
        computed = self._of_group(layout.group) if layout.leads else []
        none = like.new_zeros(0)
        sent = [
            [torch.cat([none, *(said[row][kind] for row in computed if row.owner == owner)]) for kind in kinds]
            for owner in self._ranks
        ]
        own = {
            layout.leader(group): [row for row in self._of_group(group) if row.owner == layout.rank]
            for group in range(layout.groups)
        }
        counts = {rank: sum(row.response for row in rows) for rank, rows in own.items()}
        expected = [[(counts.get(rank, 0), like.dtype) for _ in kinds] for rank in self._ranks]
        received = _exchange(self._sharding, sent, expected)
        results = [torch.zeros_like(like) for _ in kinds]
        for rank, rows in own.items():
            for result, values in zip(results, received[rank]):
                result[[row.row for row in rows]] = _padded(values, rows, like.shape[1])
        return results


def _all_rows(batch: Batch, sharding: Sharding) -> list[_Row]:
    """Of every rank, those that have something to train on."""
    trained = batch.response_mask.any(-1).nonzero().flatten().tolist()
    lengths = list(zip(batch.sequence_lengths, batch.response_lengths.tolist()))
    everyone = sharding.everyone([(row, *lengths[row]) for row in trained])
    return [_Row(owner, *row) for owner, rows in enumerate(everyone) for row in rows]


def _nothing(batch: Batch) -> Batch:
    """The least that a model takes, without a trained token."""
    part = batch.select([0])
    part.sequences = [part.sequences[0][:1]]
    part.prompt_lengths = torch.ones_like(part.prompt_lengths)
    part.response_mask = torch.zeros_like(part.response_mask)
    return part


# --- rows as flat tensors, and back ----------------------------------------------------------------------------------


def _flat(batch: Batch) -> list[Tensor]:
    """One-dimensional tensors: the tokens of all sequences, then every column without its padding."""
    within = torch.arange(batch.response_mask.shape[1]) < batch.response_lengths[:, None]
    columns = [column[within] if column.ndim == 2 else column for column in batch.columns.values()]
    return [torch.cat([torch.zeros(0, dtype=torch.int64), *batch.sequences]), *columns]


def _counts(rows: list[_Row], like: Batch) -> list[tuple[int, torch.dtype]]:
    """Elements of each tensor that :func:`_flat` makes of rows of a batch like this."""
    responses = sum(row.response for row in rows)
    columns = [(responses if column.ndim == 2 else len(rows), column.dtype) for column in like.columns.values()]
    return [(sum(row.tokens for row in rows), torch.int64), *columns]


def _batch(flat: list[Tensor], rows: list[_Row], like: Batch) -> Batch:
    """What :func:`_flat` was made of."""
    width = max((row.response for row in rows), default=1)
    columns = {
        name: _padded(values, rows, width) if column.ndim == 2 else values
        for (name, column), values in zip(like.columns.items(), flat[1:])
    }
    return Batch(sequences=list(flat[0].split([row.tokens for row in rows])), **columns)


def _padded(values: Tensor, rows: list[_Row], width: int) -> Tensor:
    """Values of all responses, one after the other, as ``[len(rows), width]``."""
    lengths = torch.tensor([row.response for row in rows], dtype=torch.int64)
    padded = values.new_zeros(len(rows), width)
    padded[torch.arange(width) < lengths[:, None]] = values
    return padded


def _exchange(
    sharding: Sharding, sent: list[list[Tensor]], expected: list[list[tuple[int, torch.dtype]]]
) -> list[list[Tensor]]:
    """What each rank has for this one, in tensors of the expected lengths and types. Collective.

    Everything travels as bytes, so that one exchange serves all types and no bit changes.
    """
    sizes = [[count * dtype.itemsize for count, dtype in counts] for counts in expected]
    packed = [torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors]) for tensors in sent]
    received = sharding.exchange(packed, [sum(of_rank) for of_rank in sizes])
    # Cloned, as a slice of bytes need not begin where another type may.
    return [
        [part.clone().view(dtype) for part, (_, dtype) in zip(data.split(of_rank), counts)]
        for data, of_rank, counts in zip(received, sizes, expected)
    ]
