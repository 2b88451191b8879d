"""Fingerprints of tensors: equal exactly when the bits are, and with a number that says how far apart two are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 22
_INTEGER_VIEW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint(NamedTuple):
    """A tensor in three numbers.

    Attributes:
        checksum: position-weighted sum of the bit patterns modulo 2^64; changes when any bit does.
        projection: float64 dot product with a fixed pattern of values in [-1, 1]; its difference measures a change.
        numel: number of elements.
    """

    checksum: int
    projection: float
    numel: int

    def difference(self, other: Fingerprint) -> float:
        """``|projection - other.projection|``."""
        return abs(self.projection - other.projection)


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Fingerprint a tensor of any floating or integer dtype on its own device, in chunks of 4 Mi elements."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_INTEGER_VIEW[flat.element_size()])
    checksum, projection = 0, 0.0
    for start in range(0, flat.numel(), _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, flat.numel()), device=flat.device, dtype=torch.int64)
        # An odd multiplier per position makes every single-bit change, and a swap of two values, visible.
        mixed = (index * 6364136223846793005 + 1442695040888963407) ^ (index >> 17)
        checksum += int((bits[start : start + _CHUNK].to(torch.int64) * (mixed | 1)).sum())
        pattern = ((mixed >> 33) & 0xFFFF).to(torch.float64) / 32767.5 - 1.0
        projection += float((flat[start : start + _CHUNK].to(torch.float64) * pattern).sum())
    return Fingerprint(checksum & (2**64 - 1), projection, flat.numel())
