"""Where rows are computed: micro-batches of like cost for every rank, of rows that other ranks may own.

A rank owns the rows that it sampled, whole groups of them, and does with them what compares responses. Forward and
backward are done where they balance best: rows travel there, and what a model said of them travels back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightrft.media import MediaProcessor, stand_in
from lightrft.ops import busiest_over_mean, loads, micro_steps
from lightrft.samples import Batch, Reading
from lightrft.sequence_cost import SequenceCost
from lightrft.strategies import Layout, Sharding


@dataclass(frozen=True)
class _Row:
    """A row with something to train on.

    Attributes:
        owner: rank that sampled it.
        row: in the owner's batch.
        tokens: of prompt and response.
        response: tokens of the response.
        cost: of computing it.
        reading: which of the owner's readings it has; -1 where its prompt has no media.
    """

    owner: int
    row: int
    tokens: int
    response: int
    cost: float
    reading: int


class Workload:
    """The rows of a batch that have a trained token, shared out to micro-batches. The constructor is collective.

    Args:
        batch: the rows that this rank owns, on the host.
        cost: of a sequence.
        tokens_per_microbatch: most tokens of a micro-batch on one rank; a longer row is alone.
        layout: groups of ranks; a group's micro-batch holds as many times the tokens, on each of its ranks.
        sharding: reaches the other ranks.
        media: reads them for the model; ``None`` where it reads text alone.

    Attributes:
        micro_batches: this group's, on the host, as many as every other's, so that collectives inside a forward keep
            step; where a group has too few rows, some are one token that is not trained on. Where other groups' have
            images or audio and this one has none, a small one that is not trained on stands in, and so it does in the
            last one where nobody has any: towers are called, and get gradients, on all ranks or on none.
            ``group_ids`` are the owners'.
        busiest_over_mean: predicted time over that of work without waiting
            (:func:`lightrft.ops.busiest_over_mean`); the same on every rank.
    """

    def __init__(
        self,
        batch: Batch,
        cost: SequenceCost,
        tokens_per_microbatch: int,
        layout: Layout,
        sharding: Sharding,
        media: MediaProcessor | None = None,
    ) -> None:
        self._batch, self._layout, self._sharding, self._media = batch, layout, sharding, media
        self._ranks = range(layout.world_size)
        self._readings = list({id(one): one for one in batch.readings if one is not None}.values())
        self._rows, self._shapes = _all_rows(batch, self._readings, cost, sharding)
        costs, sizes = [row.cost for row in self._rows], [row.tokens for row in self._rows]
        plan = micro_steps(costs, sizes, layout.groups, tokens_per_microbatch * layout.sequence_parallel_size)
        self.busiest_over_mean = busiest_over_mean(loads(costs, plan))
        group_of = {number: group for step in plan for group, part in enumerate(step) for number in part}
        self._groups = [group_of[number] for number in range(len(self._rows))]
        self._parts = [[self._rows[number] for number in step[layout.group]] for step in plan]
        held, place = self._fetch(), {row: index for index, row in enumerate(self._of_group(layout.group))}
        parts = [held.select([place[row] for row in part]) for part in self._parts]
        self.micro_batches = [self._in_step(part, kinds) for part, kinds in zip(parts, self._kinds(plan))]

    def _of_group(self, group: int) -> list[_Row]:
        """Rows that a group computes, in the order of their owners and there of the rows."""
        return [row for row, computed_by in zip(self._rows, self._groups) if computed_by == group]

    def _kinds(self, plan: list[list[list[int]]]) -> list[frozenset[str]]:
        """Of the media that any group has in each micro-step; in the last one all that any weights are for."""
        rows = [[self._rows[number] for part in step for number in part] for step in plan]
        found = [frozenset(kind for row in step for kind in self._kinds_of(row)) for step in rows]
        return [*found[:-1], found[-1] | self._media.apart] if self._media is not None else found

    def _in_step(self, part: Batch, kinds: frozenset[str]) -> Batch:
        """A micro-batch with something of every kind, and with something at all."""
        untrained = stand_in(self._media, part.readings, kinds)
        return part if untrained is None else _joined(part, untrained)

    def _kinds_of(self, row: _Row) -> frozenset[str]:
        return self._shapes[row.owner][row.reading].kinds if row.reading >= 0 else frozenset()

    def _fetch(self) -> Batch:
        """The rows of this rank's group."""
        layout, wanted = self._layout, self._of_group(self._layout.group)
        sent = [tensors for group in range(layout.groups) for tensors in self._sent_to(group)]
        of_rank = [[row for row in wanted if row.owner == rank] for rank in self._ranks]
        columns = [_counts(rows, self._batch) for rows in of_rank]
        media = [[(leaf.numel(), leaf.dtype) for leaf in _leaves(self._shapes_of(rows))] for rows in of_rank]
        received = _exchange(self._sharding, sent, [own + further for own, further in zip(columns, media)])
        cut = len(columns[0])
        held = _batch([torch.cat(parts) for parts in zip(*(own[:cut] for own in received))], wanted, self._batch)
        held.readings = []
        for rows, own in zip(of_rank, received):
            reading_of = dict(zip(_numbers(rows), _filled(self._shapes_of(rows), own[cut:])))
            held.readings += [reading_of.get(row.reading) for row in rows]
        return held

    def _sent_to(self, group: int) -> list[list[Tensor]]:
        """What each rank of a group gets of this one: its rows, then what their media are read as."""
        mine = [row for row in self._of_group(group) if row.owner == self._layout.rank]
        media = [leaf.flatten() for leaf in _leaves([self._readings[number] for number in _numbers(mine)])]
        return [_flat(self._batch.select([row.row for row in mine])) + media] * self._layout.sequence_parallel_size

    def _shapes_of(self, rows: list[_Row]) -> list[Reading]:
        """Readings of one owner's rows, each once, without what is in their tensors."""
        return [self._shapes[rows[0].owner][number] for number in _numbers(rows)]

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


def _all_rows(
    batch: Batch, readings: list[Reading], cost: SequenceCost, sharding: Sharding
) -> tuple[list[_Row], list[list[Reading]]]:
    """Of every rank, the rows that have something to train on, and its readings without what is in their tensors."""
    trained = batch.response_mask.any(-1).nonzero().flatten().tolist()
    lengths, responses = batch.sequence_lengths, batch.response_lengths.tolist()
    number_of = {id(one): number for number, one in enumerate(readings)}
    rows = [
        (row, lengths[row], responses[row], cost(lengths[row], read), number_of.get(id(read), -1))
        for row, read in ((row, batch.readings[row]) for row in trained)
    ]
    shapes = [one.to("meta") for one in readings]
    told, of_readings = zip(*sharding.everyone((rows, shapes)))
    return [_Row(owner, *row) for owner, own in enumerate(told) for row in own], list(of_readings)


def _joined(part: Batch, untrained: Reading) -> Batch:
    """A micro-batch and a row that is not trained on."""
    columns = {
        name: torch.cat([column, column.new_zeros(1, *column.shape[1:])]) for name, column in part.columns.items()
    }
    whole = Batch([*part.sequences, untrained.token_ids], readings=[*part.readings, untrained], **columns)
    whole.prompt_lengths[-1] = len(untrained.token_ids)
    return whole


def _numbers(rows: list[_Row]) -> list[int]:
    """Readings of an owner's rows, each once."""
    return sorted({row.reading for row in rows if row.reading >= 0})


def _leaves(readings: list[Reading]) -> list[Tensor]:
    """All their tensors."""
    leaves: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        leaves.append(tensor)
        return tensor

    for reading in readings:
        reading.map(keep)
    return leaves


def _filled(shapes: list[Reading], flat: list[Tensor]) -> list[Reading]:
    """The readings whose tensors, made flat, came."""
    leaves = iter(flat)
    return [shape.map(lambda leaf: next(leaves).view(leaf.shape)) for shape in shapes]


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
    columns: dict[str, Any] = {
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
