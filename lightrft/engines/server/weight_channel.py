"""Weights from a trainer to a server's worker: a process group of the two, apart from those that either belongs to.

A TCP store of the trainer's says what comes, the group carries it: NCCL from GPU to GPU, gloo through host memory
otherwise. Both ends run this file.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.engines.base import EngineError
from lightrft.engines.buckets import Piece, packed, unpacked

Backend = Literal["nccl", "gloo"]
Watch = Callable[[], None]
_BUCKET = 128 << 20  # bytes; two of them on the trainer, one on the server
_LOOK_SECONDS = 0.2  # how often an end that waits asks whether it is in vain
_JOINED, _TRAINER, _WORKER = "joined", 0, 1


class ChannelBroken(EngineError):
    """The other end is gone, or says nothing."""


@dataclass(frozen=True)
class Place:
    """Where the trainer's end is.

    Attributes:
        host: the trainer's address, as the server reaches it.
        port: of its store.
        backend: what carries the tensors.
        timeout_seconds: after which an end that hears nothing gives up.
    """

    host: str
    port: int
    backend: Backend
    timeout_seconds: float


def rendezvous(server: str, backend: Backend, timeout_seconds: float) -> tuple[dist.TCPStore, Place]:
    """Where a server's worker can join this process, and the store there.

    Args:
        server: name or address of the server's machine.
        backend: what carries the tensors.
        timeout_seconds: after which an end that hears nothing gives up.
    """
    own, timeout = _address_towards(server), timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(own, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    return store, Place(own, store.port, backend, timeout_seconds)


class WeightChannel:
    """One end of the way. :meth:`open` makes the trainer's, :meth:`join` the worker's.

    Args:
        store: of the trainer's process.
        place: where that is.
        rank: 0 is the trainer, 1 the worker.
        device: this end computes on it.
        own_address: of this machine, as the other reaches it.

    Attributes:
        place: where the trainer's end is.
        lost: whether the two ends may wait for different things from now on.
        told_all: whether the push that was received last is known to be over.
    """

    def __init__(self, store: dist.TCPStore, place: Place, rank: int, device: torch.device, own_address: str) -> None:
        self.place = place
        self._store, self._device = store, device if place.backend == "nccl" else torch.device("cpu")
        self._timeout_seconds = place.timeout_seconds
        with _broken():
            self._group = _group(store, place, rank, own_address)
        self._turn = 0
        self.lost, self.told_all = False, True

    @classmethod
    def open(cls, store: dist.TCPStore, place: Place, device: torch.device, watch: Watch) -> WeightChannel:
        """The trainer's end, once the worker has joined.

        Args:
            store, place: of :func:`rendezvous`.
            device: of the trainer's model.
            watch: raises if the worker cannot come any more.
        """
        begun = time.monotonic()
        while not store.check([_JOINED]):
            watch()
            if time.monotonic() - begun > place.timeout_seconds:
                raise ChannelBroken(f"nobody came to {place.host}:{place.port} in {place.timeout_seconds:g} seconds")
            time.sleep(0.005)
        channel = cls(store, place, _TRAINER, device, place.host)
        channel._greet(watch)
        return channel

    @classmethod
    def join(cls, place: Place, device: torch.device) -> WeightChannel:
        """The worker's end.

        Raises:
            ChannelBroken: the trainer cannot be reached; names its address.
        """
        timeout = timedelta(seconds=place.timeout_seconds)
        try:
            store = dist.TCPStore(place.host, place.port, is_master=False, wait_for_workers=False, timeout=timeout)
            own = _address_towards(place.host, place.port)
        except (RuntimeError, OSError) as error:
            raise ChannelBroken(f"the server cannot reach the trainer at {place.host}:{place.port}: {error}") from error
        store.set(_JOINED, "")
        channel = cls(store, place, _WORKER, device, own)
        channel._greet(channel.alive)
        return channel

    def send(self, tensors: Iterable[tuple[str, Tensor]], watch: Watch) -> None:
        """Send each tensor whole. An error among ``tensors`` breaks the push off at the other end too.

        Args:
            tensors: name and tensor.
            watch: called while the other end is waited for; raises where that is in vain.

        Raises:
            ChannelBroken: the other end is gone, or takes nothing for ``timeout_seconds``.
        """
        buckets = [self._bucket(), self._bucket()]
        under_way: Any = None
        try:
            for turn, pieces in enumerate(packed(tensors, buckets)):
                # The next bucket was filled while this one travelled.
                self._wait(under_way, watch)
                self._announce(pieces=[_words(piece) for piece in pieces])
                under_way = self._broadcast(buckets[turn % 2], pieces)
            self._wait(under_way, watch)
        except BaseException as error:
            self.lost = self.lost or isinstance(error, ChannelBroken) or not isinstance(error, Exception)
            self._announce(broken=str(error) or type(error).__name__)
            raise
        self._announce()

    def receive(self, watch: Watch) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one :meth:`send`, on the device that they travel by.

        Raises:
            EngineError: the trainer broke off.
        """
        bucket, self.told_all = self._bucket(), False

        def filled() -> list[Piece] | None:
            with _broken():
                said = json.loads(self._store.get(self._key))
                self._store.delete_key(self._key)
            self._turn += 1
            self.told_all = "pieces" not in said
            if "broken" in said:
                raise EngineError(f"the trainer broke the push off: {said['broken']}")
            if "pieces" not in said:
                return None
            pieces = [_piece(*fields) for fields in said["pieces"]]
            self._wait(self._broadcast(bucket, pieces), watch)
            return pieces

        return unpacked(filled, lambda: None, [bucket])

    def alive(self) -> None:
        """Raise unless the trainer's store answers."""
        with _broken():
            self._store.check([_JOINED])

    def close(self) -> None:
        if isinstance(self._group, dist.ProcessGroupGloo):
            return
        self._group.abort()

    def _greet(self, watch: Watch) -> None:
        """Send one byte: NCCL connects only then, and cannot be watched while it does."""
        with _broken():
            under_way = self._group.broadcast(torch.zeros(1, dtype=torch.uint8, device=self._device), _TRAINER)
        self._wait(under_way, watch)

    def _bucket(self) -> Tensor:
        return torch.empty(_BUCKET, dtype=torch.uint8, device=self._device)

    def _announce(self, **said: Any) -> None:
        self._store.set(self._key, json.dumps(said))
        self._turn += 1

    @property
    def _key(self) -> str:
        """In the store, which NCCL uses too: its keys are plain numbers."""
        return f"turn/{self._turn}"

    def _broadcast(self, bucket: Tensor, pieces: list[Piece]) -> Any:
        part = bucket[: pieces[-1].at + pieces[-1].size]
        with _broken():
            return self._group.broadcast(part, _TRAINER)

    def _wait(self, work: Any, watch: Watch) -> None:
        """Until a broadcast is done."""
        if work is None:
            return
        self.lost, begun = True, time.monotonic()
        looked = begun
        while not work.is_completed():
            now = time.monotonic()
            if now - begun > self._timeout_seconds:
                raise ChannelBroken(f"nothing moved for {self._timeout_seconds:g} seconds")
            if now - looked > _LOOK_SECONDS:
                watch()
                looked = now
            time.sleep(0.0002 if now - begun < _LOOK_SECONDS else 0.002)
        with _broken():
            work.wait()
        self.lost = False


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed raises
        raise ChannelBroken(str(error)) from error


def _group(store: dist.TCPStore, place: Place, rank: int, own_address: str) -> Any:
    """A process group of its own, whatever the process's default group is."""
    timeout = timedelta(seconds=place.timeout_seconds)
    options: Any
    if place.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = 2 * timeout  # at which it would end the process
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    gloo: Any = dist.ProcessGroupGloo  # the stubs name its options otherwise
    options = gloo._Options()
    options._timeout = timeout
    # By the address that the other end reaches: a machine's own name may stand for its loopback.
    options._devices = [gloo.create_device(hostname=own_address)]
    return gloo(store, rank, 2, options)


def _address_towards(host: str, port: int = 9) -> str:
    """This machine's address on the way to ``host``; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _words(piece: Piece) -> list[Any]:
    """As JSON can have it."""
    return [piece.name, str(piece.dtype).removeprefix("torch."), *piece[2:]]


def _piece(name: str, dtype: str, shape: list[int], start: int, at: int, size: int) -> Piece:
    return Piece(name, getattr(torch, dtype), tuple(shape), start, at, size)
