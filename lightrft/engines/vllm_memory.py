"""Giving back the device memory of a vLLM engine that ends."""

from __future__ import annotations

import gc
from typing import Any

import torch

# Pools of engines that have ended: freeing a block of one would call vLLM's allocator, which knows it no more.
_ENDED: list[Any] = []


def forget_pools() -> None:
    """Let vLLM's allocator, which is one a process, serve a next engine.

    The last one was put to sleep, so that what it held on the device is unmapped, and nothing refers to it any more.
    """
    from vllm.device_allocator.cumem import CuMemAllocator

    gc.collect()
    allocator = CuMemAllocator.get_instance()
    _ENDED.append(dict(allocator.allocator_and_pools))
    allocator.allocator_and_pools.clear()
    allocator.pointer_to_data.clear()
    torch.cuda.empty_cache()
