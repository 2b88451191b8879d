"""Tensors whose memory goes to the host while nothing computes with them, and comes back in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Movable:
    """Tensors that can be away, in host memory.

    It is their storages that are emptied and filled again: parameters, DTensors, flat buffers and views into them stay
    the objects they are, under every strategy. On a GPU the copies go through pinned memory, which is kept, on a stream
    of their own. While they are away nothing may read them: :meth:`here` comes first.

    Args:
        tensors: which ones, asked for each time that they leave; those on another kind of device stay where they are.
        device: where this rank computes.
        constant: their values never change, so that one copy to the host is enough.

    Attributes:
        away: whether they are.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], device: torch.device, constant: bool = False) -> None:
        self._tensors, self._device, self._constant = tensors, device, constant
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pairs: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._coming = False
        self.away = False

    def fetch(self) -> None:
        """Begin to bring them back; what comes before :meth:`here` goes on at the same time."""
        if not self.away:
            return
        for storage, copy in self._pairs.values():
            storage.resize_(len(copy))
        with self._beside():
            for storage, copy in self._pairs.values():
                _bytes(storage).copy_(copy, non_blocking=True)
        self.away, self._coming = False, True

    def here(self) -> None:
        """They can be computed with from here on: brought back, and the device, not the host, waits for them."""
        self.fetch()
        if self._coming and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._coming = False

    def _copy(self) -> None:
        self.here()
        storages = {storage._cdata: storage for storage in map(_storage, self._tensors()) if self._goes(storage)}
        known = self._pairs
        self._pairs = {key: known.get(key) or (storage, _room(storage)) for key, storage in storages.items()}
        with self._beside():
            for key, (storage, copy) in self._pairs.items():
                if not (self._constant and key in known):
                    copy.copy_(_bytes(storage), non_blocking=True)

    def _leave(self) -> int:
        """Free what is copied; bytes."""
        if self._stream is not None:
            self._stream.synchronize()
        for storage, _ in self._pairs.values():
            storage.resize_(0)
        self.away = True
        return sum(len(copy) for _, copy in self._pairs.values())

    def _goes(self, storage: torch.UntypedStorage) -> bool:
        return storage.device.type == self._device.type and storage.nbytes() > 0 and storage.resizable()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """What is copied in it waits for what the device was given so far, and nothing waits for it."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield


def to_host(movables: Sequence[Movable]) -> int:
    """Let them leave, and give the memory back to the device: engines may take theirs outside torch's allocator.

    Returns:
        bytes that are away on this rank.
    """
    present = [movable for movable in movables if not movable.away]
    for movable in present:
        movable._copy()
    freed = sum(movable._leave() for movable in present)
    if freed and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return freed


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _room(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
