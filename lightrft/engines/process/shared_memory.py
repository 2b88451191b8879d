"""Memory that two processes of one machine see: of the host, or of a CUDA device. It has no name that could be left."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightrft.engines.base import EngineError

_LAZY_PEER_ACCESS, _OUT_OF_MEMORY = 1, 2  # of the driver's API


@contextmanager
def given(size: int, device: torch.device, file: int) -> Iterator[tuple[Tensor, bytes | None]]:
    """Memory to share for as long as the context lasts.

    Args:
        size: bytes.
        device: whose memory: a CUDA device's its own, any other's the host's.
        file: descriptor of an anonymous file that both processes have; holds the host's memory.

    Returns:
        uint8 ``[size]``, and the key with which another process has it :func:`taken`.
    """
    if device.type == "cuda":
        with _given_on_cuda(size, device) as shared:
            yield shared
        return
    os.ftruncate(file, size)
    try:
        yield _mapped(size, file), None
    finally:
        os.ftruncate(file, 0)  # pages go back; nobody looks at a mapping once the context has ended


@contextmanager
def taken(size: int, device: torch.device, file: int, key: bytes | None) -> Iterator[Tensor]:
    """The same memory in another process; ``key`` is what :func:`given` gave, which must last longer than this."""
    if key is None:
        yield _mapped(size, file)
        return
    pointer = ctypes.c_uint64()
    with _context(device):
        _driver("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), _Handle.from_buffer_copy(key), _LAZY_PEER_ACCESS)
    try:
        yield _tensor(pointer.value, size, device)
    finally:
        with _context(device):
            torch.cuda.synchronize(device)
            _driver("cuIpcCloseMemHandle", pointer)


def settle(tensor: Tensor) -> None:
    """Wait until what was written to, or read from, the tensor's memory is done, so that another process may go on."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _mapped(size: int, file: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)


# CUDA's own calls rather than torch's sharing of tensors: the two processes may have different versions of torch, and
# expandable segments of torch's allocator are shared by system calls that containers forbid.


class _Handle(ctypes.Structure):
    _fields_ = [("data", ctypes.c_ubyte * 64)]


class _Memory:
    """What torch makes a tensor of without a copy."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


@contextmanager
def _given_on_cuda(size: int, device: torch.device) -> Iterator[tuple[Tensor, bytes]]:
    pointer, handle = ctypes.c_uint64(), _Handle()
    with _context(device):
        try:
            _driver("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        except MemoryError:
            torch.cuda.empty_cache()  # what torch keeps for itself may be enough
            _driver("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
    try:
        with _context(device):
            _driver("cuIpcGetMemHandle", ctypes.byref(handle), pointer)
        yield _tensor(pointer.value, size, device), bytes(handle)
    finally:
        with _context(device):
            torch.cuda.synchronize(device)
            _driver("cuMemFree_v2", pointer)


@contextmanager
def _context(device: torch.device) -> Iterator[None]:
    """The device's primary context, which is torch's, is the one that the driver's calls are about."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        yield


def _driver(name: str, *arguments: Any) -> None:
    code = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    if code == _OUT_OF_MEMORY:
        raise MemoryError(f"{name}: the CUDA device is out of memory.")
    if code:
        raise EngineError(f"CUDA's {name} failed with error {code}; the two processes must share one device.")


def _tensor(pointer: int | None, size: int, device: torch.device) -> Tensor:
    return torch.as_tensor(_Memory(pointer or 0, size), device=device)
