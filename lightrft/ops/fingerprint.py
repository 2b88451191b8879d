"""Fingerprints of tensors: equal exactly when the bits are, and with a number that says how far apart two are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightrft.ops.shard import Shard

_CHUNK = 1 << 22
# Eight bytes are two values: sums modulo 2^64 would lose what only their highest bits say.
_INTEGER_VIEW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@dataclass(frozen=True)
class Fingerprint:
    """A tensor in three numbers. Equal are those of equal checksum and size; devices round the projection differently.

    Attributes:
        checksum: position-weighted sum of the bit patterns modulo 2^64; changes when any bit does.
        projection: float64 dot product with a fixed pattern of values in [-1, 1]; its difference measures a change.
        numel: number of elements.
    """

    checksum: int
    projection: float = field(compare=False)
    numel: int

    def difference(self, other: Fingerprint) -> float:
        """``|projection - other.projection|``."""
        return abs(self.projection - other.projection)


def fingerprint(tensor: Tensor, shard: Shard | None = None) -> Fingerprint:
    """Fingerprint a tensor of any floating or integer dtype on its own device, in chunks of 4 Mi elements.

    Args:
        tensor: the tensor, or a part of one.
        shard: which part ``tensor`` is; ``None`` is all of it. :func:`joined` parts are the whole's fingerprint.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_INTEGER_VIEW[flat.element_size()])
    integers = max(1, flat.element_size() // bits.element_size())  # of each element
    checksum, projection = 0, 0.0
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK]
        # An odd multiplier per position makes every single-bit change, and a swap of two values, visible.
        checksum += int((part.to(torch.int64) * (_mixed(start, part, shard, integers) | 1)).sum())
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        pattern = ((_mixed(start, part, shard, 1) >> 33) & 0xFFFF).to(torch.float64) / 32767.5 - 1.0
        projection += float((part.to(torch.float64) * pattern).sum())
    return Fingerprint(checksum & (2**64 - 1), projection, flat.numel())


def joined(parts: Iterable[Fingerprint]) -> Fingerprint:
    """Fingerprint of the tensor that the parts make up, be it cut into one or many."""
    checksum, projection, numel = 0, 0.0, 0
    for part in parts:
        checksum, projection, numel = checksum + part.checksum, projection + part.projection, numel + part.numel
    return Fingerprint(checksum & (2**64 - 1), projection, numel)


def _mixed(start: int, part: Tensor, shard: Shard | None, integers: int) -> Tensor:
    """A fixed pseudo-random int64 for each position, from ``start`` on, of the whole tensor's integers."""
    index = torch.arange(start, start + part.numel(), device=part.device, dtype=torch.int64)
    if shard is not None:
        index = shard.positions(index // integers) * integers + index % integers
    return (index * 6364136223846793005 + 1442695040888963407) ^ (index >> 17)
