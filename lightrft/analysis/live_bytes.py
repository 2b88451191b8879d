"""Bytes of the tensors that are alive while a piece of work runs, by what they are for, and the most there were."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, what operations allocate, on any device and of fake tensors too.

    Every storage is counted once, from the operation that returns it until nothing refers to it. What a kernel takes
    and gives back within itself is not seen.

    Args:
        ignored: tensors that were there before; their memory is not counted.
        name: what a new tensor is for, by the operation, its arguments and the tensor.

    Attributes:
        now: bytes alive by name.
        peak: ``now`` at the moment of the largest sum.
    """

    def __init__(
        self,
        ignored: Iterable[Tensor] = (),
        name: Callable[[Any, tuple[Any, ...], Tensor], str] = lambda operation, arguments, result: "tensors",
    ) -> None:
        super().__init__()
        self.now: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._name = name
        # The storages are held, or another could take the place of one that went.
        self._ignored = {_key(tensor): tensor.untyped_storage() for tensor in ignored}
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._ignored and _key(tensor) not in self._alive:
                self._count(tensor, self._name(func, args, tensor))
        return result

    def rename(self, tensor: Tensor, name: str) -> None:
        """Count what ``tensor`` lies in under another name from now on; nothing happens where it is not counted."""
        key = _key(tensor)
        if key in self._alive:
            reference, old, size = self._alive[key]
            self._add(old, -size)
            self._alive[key] = (reference, name, size)
            self._add(name, size)

    def _count(self, tensor: Tensor, name: str) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        size = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, lambda _: self._forget(key)), name, size)
        self._add(name, size)
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)

    def _forget(self, key: int) -> None:
        _, name, size = self._alive.pop(key)
        self._add(name, -size)

    def _add(self, name: str, size: int) -> None:
        self.now[name] = self.now.get(name, 0) + size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
