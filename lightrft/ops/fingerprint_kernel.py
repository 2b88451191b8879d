"""The sums of a fingerprint on a GPU: one launch a tensor. Needs Triton, which comes with torch's CUDA builds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs share the rows of a tensor: as many as an H100 holds at once, or as it has rows.
_PROGRAMS = 1024
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VALUES = {
    torch.bool: tl.int8,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.float8_e5m2: tl.float8e5,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def takes(tensor: Tensor) -> bool:
    """Whether the kernel knows the dtype there: NVIDIA's GPUs before compute capability 8.9 convert no 8-bit floats."""
    if tensor.is_cuda and tensor.is_floating_point() and tensor.element_size() == 1:
        return tensor.dtype in _VALUES and torch.cuda.get_device_capability(tensor.device) >= (8, 9)
    return tensor.dtype in _VALUES


def add_sums(flat: Tensor, columns: Tensor, rows: Tensor, row: int, checksum: Tensor, projection: Tensor) -> None:
    """Add the two sums of a whole tensor to two cells on its device.

    Args:
        flat: (elements), contiguous, of a dtype that the kernel :func:`takes`.
        columns: int64, (row), weights of the 32-bit integers of a row; (2 · row) for elements of 8 bytes.
        rows: int64, weights of the rows, more than elements // row.
        row: elements of a row, a power of two.
        checksum: int64, ().
        projection: float64, ().
    """
    numel = flat.numel()
    if numel:
        bits = flat.view(_BITS[flat.element_size()])
        programs = min(-(-numel // row), _PROGRAMS)
        with torch.cuda.device_of(flat):  # Triton launches on the current one
            _add_sums[(programs,)](bits, numel, columns, rows, checksum, projection, _VALUES[flat.dtype], row)


# Compiled once for each kind of value, twice if some begin at odd addresses, and not for each size.
@triton.jit(do_not_specialize=["numel", "checksum", "projection"])
def _add_sums(
    bits: tl.tensor,
    numel: tl.int64,
    columns: tl.tensor,
    rows: tl.tensor,
    checksum: tl.tensor,
    projection: tl.tensor,
    VALUE: tl.constexpr,
    ROW: tl.constexpr,
) -> None:
    """A program sums its rows by columns, each times the row's weight, and these sums times the columns' in the end."""
    low = tl.zeros([ROW], tl.int64)
    high = tl.zeros([ROW], tl.int64)
    value = tl.zeros([ROW], tl.float64)
    whole = numel // ROW
    for row in tl.range(tl.program_id(0).to(tl.int64), whole, tl.num_programs(0), loop_unroll_factor=4):
        low, high, value = _with_row(low, high, value, bits, numel, rows, row, VALUE, ROW, False)
    if tl.program_id(0) == tl.num_programs(0) - 1:  # what is left at the end, or nothing
        low, high, value = _with_row(low, high, value, bits, numel, rows, whole, VALUE, ROW, True)
    column = tl.arange(0, ROW)
    value *= _projection_weight(tl.load(columns + column))
    if VALUE.primitive_bitwidth == 64:
        low = low * tl.load(columns + 2 * column) + high * tl.load(columns + 2 * column + 1)
    else:
        low *= tl.load(columns + column)
    tl.atomic_add(checksum, tl.sum(low), sem="relaxed")
    tl.atomic_add(projection, tl.sum(value), sem="relaxed")


@triton.jit
def _with_row(
    low: tl.tensor,
    high: tl.tensor,
    value: tl.tensor,
    bits: tl.tensor,
    numel: tl.tensor,
    rows: tl.tensor,
    row: tl.tensor,
    VALUE: tl.constexpr,
    ROW: tl.constexpr,
    LAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    at = row * ROW + tl.arange(0, ROW)
    # Only where it is needed: under a mask elements are read one by one.
    read = tl.load(bits + at, mask=at < numel, other=0) if LAST else tl.load(bits + at)
    weight = tl.load(rows + row)
    if VALUE.primitive_bitwidth == 64:
        low += read.to(tl.int32).to(tl.int64) * weight
        high += (read >> 32) * weight
    else:
        low += read.to(tl.int64) * weight
    values = read.to(VALUE, bitcast=True)
    if VALUE.primitive_bitwidth < 32:
        values = values.to(tl.float32)
    value += values.to(tl.float64) * _projection_weight(weight)
    return low, high, value


@triton.jit
def _projection_weight(weight: tl.tensor) -> tl.tensor:
    return (weight >> 40).to(tl.float64) * (1.0 / 8388608)
