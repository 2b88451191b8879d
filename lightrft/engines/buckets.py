"""Weights as a stream of buckets: packed by one process, unpacked by another that sees the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Bytes of one tensor in a bucket; a tensor that does not fit goes on in the next ones.

    Attributes:
        name: of the tensor.
        dtype: of the tensor.
        shape: of the whole tensor.
        start: which of its bytes is the piece's first.
        at: where in the bucket they are.
        size: how many bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    at: int
    size: int


def packed(tensors: Iterable[tuple[str, Tensor]], buckets: Sequence[Tensor]) -> Iterator[list[Piece]]:
    """Copy ``tensors`` into the buckets in turn; what is in each when it is full, and in the last.

    Args:
        tensors: name and tensor, on any device.
        buckets: uint8 ``[bytes]`` of equal size. When the pieces of one are taken, the next one is filled.
    """
    turn, used, pieces = 0, 0, list[Piece]()
    for name, tensor in tensors:
        data = _bytes(tensor.detach().contiguous())
        start = 0
        while True:  # once at least: one without elements is a piece too
            bucket = buckets[turn % len(buckets)]
            size = min(len(data) - start, len(bucket) - used)
            bucket[used : used + size].copy_(data[start : start + size])
            pieces.append(Piece(name, tensor.dtype, tuple(tensor.shape), start, used, size))
            start, used = start + size, used + size
            if used == len(bucket):
                yield pieces
                turn, used, pieces = turn + 1, 0, []
            if start == len(data):
                break
        del tensor, data  # before the next one is made
    if pieces:
        yield pieces


def unpacked(
    receive: Callable[[], list[Piece] | None], done: Callable[[], None], buckets: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors again, one after the other, each with memory of its own on the buckets' device.

    Args:
        receive: what is in the next bucket; ``None`` after the last.
        done: called when a bucket may be filled again.
        buckets: those of :func:`packed`.
    """
    turn = 0
    while (pieces := receive()) is not None:
        bucket = buckets[turn % len(buckets)]
        for piece in pieces:
            if piece.start == 0:
                tensor = torch.empty(piece.shape, dtype=piece.dtype, device=bucket.device)
            data = _bytes(tensor)
            data[piece.start : piece.start + piece.size].copy_(bucket[piece.at : piece.at + piece.size])
            if piece.start + piece.size == len(data):
                yield piece.name, tensor
                del tensor, data  # before the next one is made
        done()
        turn += 1


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
