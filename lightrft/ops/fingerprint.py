"""Fingerprints of tensors: equal exactly when the bits are, and with a number that says how far apart two are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightrft.ops.shard import Shard

# The weight of position p is columns[p % _ROW] * rows[p // _ROW]: two small tables, which stay in cache, instead of a
# number for every position. Integers have odd ones, whose product is odd: any change of one of them is seen.
# A row of elements that are two integers each has twice as many of these.
_ROW = 1 << 10
# Elements at a time, each 8 bytes of temporary memory: few launches on a GPU, on a CPU what its cache holds.
_CHUNK, _CPU_CHUNK = 1 << 24, 1 << 17
_CELLS = 64  # zeros made at a time for the kernel to add to
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


class Fingerprints:
    """Of many tensors: each is taken on its own device at once, and all are read from there together.

    To read one waits for the device, and a model has hundreds. Of CUDA's streams, use one for all.
    """

    def __init__(self) -> None:
        self._taken: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._cells: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    def add(self, name: str, tensor: Tensor, shard: Shard | None = None) -> None:
        """Take that of a tensor of any floating or integer dtype, which may change afterwards. Needs 128 MiB at most.

        Args:
            name: what to call it.
            tensor: the tensor, or a part of one.
            shard: which part ``tensor`` is; ``None`` is all of it. :func:`joined` parts are the whole's fingerprint.
        """
        flat = tensor.detach().contiguous().view(-1)
        bits = flat.view(_INTEGER_VIEW[flat.element_size()])
        integers = max(1, flat.element_size() // bits.element_size())  # of each element
        kernel = kernel_on(flat.device) if shard is None else None
        if kernel is not None and kernel.takes(flat):
            checksum, projection = self._cell(flat.device)
            columns, rows = _tables(flat.numel(), torch.int64, integers, flat.device)
            kernel.add_sums(flat, columns, rows, _ROW, checksum, projection)
        else:
            checksum = _weighted_sum(bits, torch.int64, shard, integers)
            projection = _weighted_sum(flat, torch.float64, shard, 1)
        self._taken[name] = checksum, projection, flat.numel()

    def read(self) -> dict[str, Fingerprint]:
        """All of them by name."""
        checksums = _numbers([checksum for checksum, _, _ in self._taken.values()])
        projections = _numbers([projection for _, projection, _ in self._taken.values()])
        return {
            name: Fingerprint(checksum & (2**64 - 1), projection, numel)
            for (name, (_, _, numel)), checksum, projection in zip(self._taken.items(), checksums, projections)
        }

    def _cell(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Zeros for a checksum and a projection, from many that are made together."""
        cells = self._cells.setdefault(device, [])
        if not cells:
            zeros = [torch.zeros(_CELLS, dtype=dtype, device=device) for dtype in (torch.int64, torch.float64)]
            cells.extend(zip(*(many.unbind() for many in zeros)))
        return cells.pop()


def fingerprint(tensor: Tensor, shard: Shard | None = None) -> Fingerprint:
    """Fingerprint of one tensor (:meth:`Fingerprints.add`)."""
    one = Fingerprints()
    one.add("", tensor, shard)
    return one.read()[""]


def joined(parts: Iterable[Fingerprint]) -> Fingerprint:
    """Fingerprint of the tensor that the parts make up, be it cut into one or many."""
    checksum, projection, numel = 0, 0.0, 0
    for part in parts:
        checksum, projection, numel = checksum + part.checksum, projection + part.projection, numel + part.numel
    return Fingerprint(checksum & (2**64 - 1), projection, numel)


def _numbers(scalars: list[Tensor]) -> list[Any]:
    """One transfer for each device they lie on."""
    devices = {scalar.device for scalar in scalars}
    read = {device: iter(torch.stack([s for s in scalars if s.device == device]).tolist()) for device in devices}
    return [next(read[scalar.device]) for scalar in scalars]


@lru_cache
def kernel_on(device: torch.device) -> ModuleType | None:
    """The module of the kernel, which takes a whole tensor in one launch; ``None`` where it does not work."""
    if device.type != "cuda":
        return None
    try:
        from lightrft.ops import fingerprint_kernel

        sums = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.float64, device=device)
        tried = torch.ones(1, dtype=torch.bfloat16, device=device)
        fingerprint_kernel.add_sums(tried, *_tables(1, torch.int64, 1, device), _ROW, *sums)
    except Exception as error:  # no Triton, no C compiler for its launcher, no Python.h, a GPU that it does not know
        warnings.warn(f"Fingerprints take longer on {device}, where Triton does not work: {error!r}", stacklevel=4)
        return None
    return fingerprint_kernel


def _tables(numel: int, dtype: torch.dtype, integers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights of columns and of rows, for so many elements of so many integers."""
    # Tables of a few sizes serve all tensors.
    rows = 1 << (numel // _ROW).bit_length()
    return _weights(_ROW * integers, dtype, 1, device), _weights(rows, dtype, 2, device)


def _weighted_sum(flat: Tensor, dtype: torch.dtype, shard: Shard | None, integers: int) -> Tensor:
    """Sum over elements, in ``dtype``, of each times the weight of its position in the whole tensor's integers."""
    numel = flat.numel() // integers if shard is None else math.prod(shard.whole)
    columns, rows = _tables(numel, dtype, integers, flat.device)
    row = len(columns)
    if shard is None:
        parts = [
            (_product(part, columns[: part.shape[1]]).sum(1) * rows[start : start + len(part)]).sum()
            for start, part in _matrices(flat, row)
        ]
    else:
        parts = [
            (_product(flat[start : start + len(at)], columns[at % row]) * rows[at // row]).sum()
            for start, at in _positions(flat, shard, integers)
        ]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=dtype, device=flat.device)


def _matrices(flat: Tensor, row: int) -> Iterator[tuple[int, Tensor]]:
    """The elements by rows, a chunk of these at a time and what is left at the end by itself; with the first row."""
    whole, rows = flat.numel() // row, max(1, _chunk(flat) // row)
    for start in range(0, whole, rows):
        stop = min(whole, start + rows)
        yield start, flat[start * row : stop * row].view(-1, row)
    if flat.numel() % row:
        yield whole, flat[whole * row :].view(1, -1)


def _positions(flat: Tensor, shard: Shard, integers: int) -> Iterator[tuple[int, Tensor]]:
    """Where the elements of a part lie in the whole, a chunk at a time."""
    for start in range(0, flat.numel(), _chunk(flat)):
        at = torch.arange(start, min(flat.numel(), start + _chunk(flat)), device=flat.device)
        yield start, shard.positions(at // integers) * integers + at % integers


def _chunk(flat: Tensor) -> int:
    return _CPU_CHUNK if flat.device.type == "cpu" else _CHUNK


def _product(values: Tensor, weights: Tensor) -> Tensor:
    if values.dtype.itemsize == 1 and values.is_floating_point():
        values = values.to(torch.float32)  # torch multiplies no 8-bit floats
    return values * weights


@lru_cache(maxsize=64)
def _weights(size: int, dtype: torch.dtype, table: int, device: torch.device) -> Tensor:
    """Pseudo-random numbers, the same on every device: odd int64 ones, or float64 ones in [-1, 1]."""
    # The steps of SplitMix64 (Steele, Lea and Flood, 2014), with shifts that keep the sign.
    mixed = torch.arange(1, size + 1, device=device) * -7046029254386353131 + table
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed = mixed ^ (mixed >> 31)
    return mixed | 1 if dtype == torch.int64 else (mixed >> 40).to(dtype) / 2**23
