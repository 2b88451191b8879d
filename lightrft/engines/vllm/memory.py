"""Giving back the device memory of a vLLM engine that ends."""

from __future__ import annotations

import ctypes
import gc

import torch


def forget_pools() -> None:
    """Let vLLM's allocator, which is one a process, serve a next engine.

    The last one was put to sleep, so that what it held on the device is unmapped, and nothing refers to it any more.
    """
    from vllm.device_allocator.cumem import CuMemAllocator

    gc.collect()
    allocator = CuMemAllocator.get_instance()
    for pool in allocator.allocator_and_pools.values():
        # Kept for ever, past the interpreter's end: freeing it would have the allocator free what it has forgotten.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))
    allocator.allocator_and_pools.clear()
    allocator.pointer_to_data.clear()
    torch.cuda.empty_cache()
