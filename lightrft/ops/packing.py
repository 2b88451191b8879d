"""Packing: ragged sequences as one row of tokens, and the way back to ``[B, T]`` response tensors.

A packed row computes no padding: position ids restart at each sequence and ``cu_seqlens`` keeps attention inside it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightrft.samples import MediaItem, Reading


@dataclass(eq=False)
class Packed:
    """Model input for ``S`` sequences of ``N`` tokens together, of which ``M`` positions predict a trained token.

    Attributes:
        input_ids: int64 ``[N]``.
        position_ids: int64 ``[N]``, from 0 in each sequence.
        cu_seqlens: int32 ``[S + 1]``, start of each sequence and ``N``.
        predict: int64 ``[M]``, packed positions whose *next* token is trained on.
        media: what the model takes beside the tokens, by the name of its argument: features of the images and audio of
            all sequences, one after the other, and what its processor says of each token, int64 ``[N]``.
        rows, columns: int64 ``[M]``, where in ``[B, T]`` each prediction belongs.
        shape: ``(B, T)``.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    predict: Tensor
    media: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """What actor and critic are called with."""
        return self.input_ids, self.position_ids, self.cu_seqlens, self.predict, self.media

    def to(self, device: torch.device) -> Packed:
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in ("shape", "media")}
        media = {name: tensor.to(device) for name, tensor in self.media.items()}
        return Packed(shape=self.shape, media=media, **tensors)

    def scatter(self, values: Tensor) -> Tensor:
        """Put ``[M]`` per-prediction values at their places in ``[B, T]``; the rest is 0. Differentiable."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)


def pack(
    sequences: Sequence[Tensor],
    prompt_lengths: Tensor,
    response_mask: Tensor,
    readings: Sequence[Reading | None] = (),
) -> Packed:
    """Pack sequences, those without anything to train on too.

    Args:
        sequences: ``B`` int64 ``[L_i]`` tensors, prompt then response; at least one.
        prompt_lengths: int64 ``[B]``.
        response_mask: bool ``[B, T]``; column ``t`` of row ``i`` is token ``prompt_lengths[i] + t``.
        readings: ``B``, of the prompts; none where no prompt has media.

    Raises:
        ValueError: a trained token at position 0 (no token before predicts it) or past the end of its sequence; or
            features of several media that cannot be joined.
    """
    rows, columns = response_mask.nonzero(as_tuple=True)
    device = response_mask.device
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    ends = lengths.cumsum(0)
    token = prompt_lengths.to(device)[rows] + columns
    if bool((token < 1).any()) or bool((token >= lengths[rows]).any()):
        raise ValueError("A trained token lies outside its sequence or has no token before it; prompts need a token.")
    return Packed(
        input_ids=torch.cat(list(sequences)),
        position_ids=torch.cat([torch.arange(len(sequence), device=device) for sequence in sequences]),
        cu_seqlens=torch.cat([ends[:1] - lengths[:1], ends]).to(torch.int32),
        predict=(ends - lengths)[rows] + token - 1,
        media=_media(sequences, readings),
        rows=rows,
        columns=columns,
        shape=(len(sequences), response_mask.shape[1]),
    )


def joined_features(items: Iterable[MediaItem]) -> dict[str, Tensor]:
    """What a model takes beside the tokens, for items in the order in which they stand in its rows.

    Raises:
        ValueError: features that differ in more than their first dimension, so that they cannot be joined.
    """
    found: dict[str, list[Tensor]] = {}
    for item in items:
        for name, tensor in item.features.items():
            found.setdefault(name, []).append(tensor)
    for name, tensors in found.items():
        if len(shapes := {tuple(tensor.shape[1:]) for tensor in tensors}) > 1:
            raise ValueError(f"{name} of several items have shapes {sorted(shapes)} each; they cannot be joined.")
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def _media(sequences: Sequence[Tensor], readings: Sequence[Reading | None]) -> dict[str, Tensor]:
    items = [item for reading in readings if reading is not None for item in reading.items]
    names = {name for reading in readings if reading is not None for name in reading.token_types}
    types = {name: [torch.zeros_like(sequence) for sequence in sequences] for name in sorted(names)}
    for row, reading in enumerate(readings):
        for name, of_prompt in (reading.token_types if reading is not None else {}).items():
            types[name][row][: len(of_prompt)] = of_prompt
    return joined_features(items) | {name: torch.cat(rows) for name, rows in types.items()}


def pad(values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed ``[N, ...]`` as right-padded ``[S, L, ...]`` with zeros, and the bool mask ``[S, L]`` of what is real."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    mask = torch.arange(int(lengths.max()), device=values.device) < lengths[:, None]
    padded = values.new_zeros(*mask.shape, *values.shape[1:])
    padded[mask] = values
    return padded, mask


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Share sequences out to few micro-batches within a token budget, evenly: longest first to the emptiest.

    Args:
        lengths: tokens of each sequence.
        budget: most tokens in a micro-batch; a single longer sequence gets a micro-batch of its own.

    Returns:
        Row indices of each micro-batch, ascending within it; deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    alone = [[row] for row in order if lengths[row] > budget]
    rest = order[len(alone) :]
    count = max(1, fewest_parts([lengths[row] for row in rest], budget))
    while (shared := _emptiest_first(rest, lengths, budget, count)) is None:
        count += 1
    return alone + [sorted(rows) for rows in shared if rows]


def fewest_parts(lengths: Sequence[int], budget: int) -> int:
    """Micro-batches that sequences need at least within a token budget, each longer one alone."""
    rest = [length for length in lengths if length <= budget]
    # All tokens must fit, and no two rows of more than half the budget fit together.
    return len(lengths) - len(rest) + max(-(-sum(rest) // budget), sum(2 * length > budget for length in rest))


def _emptiest_first(order: list[int], lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """``order`` dealt to ``count`` micro-batches; ``None`` where one would hold more than ``budget``."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for row in order:
        load, emptiest = loads[0]
        if load + lengths[row] > budget:
            return None
        bins[emptiest].append(row)
        heapq.heapreplace(loads, (load + lengths[row], emptiest))
    return bins
