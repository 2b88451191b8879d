"""Messages between two processes of one run: pickled, their tensors in one flat array a dtype, over a stream socket."""

from __future__ import annotations

import io
import math
import pickle
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LENGTH = struct.Struct("!Q")
_SECONDS_TO_IDLE = 0.2


def dumps(message: Any) -> bytes:
    """Anything that can be pickled; tensors may be in it anywhere, thousands of them for the price of few."""
    body = io.BytesIO()
    pickler = _Pickler(body)
    pickler.dump(message)
    arrays = {}
    for dtype, tensors in pickler.tensors.items():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        arrays[dtype] = [tuple(tensor.shape) for tensor in tensors], bytearray(flat.view(torch.uint8).numpy())
    return pickle.dumps((body.getvalue(), arrays), protocol=5)


def loads(message: bytes | bytearray) -> Any:
    """What :func:`dumps` was given; tensors are on the CPU, each with memory of its own."""
    body, arrays = pickle.loads(message)
    tensors = {}
    for dtype, (shapes, data) in arrays.items():
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        parts = flat.split([math.prod(shape) for shape in shapes])
        # Each its own: views would keep, and save with each of them, the memory of all.
        tensors[dtype] = [part.clone().view(shape) for part, shape in zip(parts, shapes)]
    unpickler = pickle.Unpickler(io.BytesIO(body))
    unpickler.persistent_load = lambda key: tensors[key[0]][key[1]]  # type: ignore[method-assign]
    return unpickler.load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and collects them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: dict[torch.dtype, list[Tensor]] = {}

    def persistent_id(self, item: Any) -> tuple[torch.dtype, int] | None:
        if not isinstance(item, Tensor):
            return None
        alike = self.tensors.setdefault(item.dtype, [])
        alike.append(item.detach().cpu())
        return item.dtype, len(alike) - 1


class Line:
    """Whole messages over one end of a socket pair; several threads may send, one receives.

    Args:
        connection: the end; it is this object's from here on.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SECONDS_TO_IDLE)
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Any, idle: Callable[[], None] = lambda: None) -> None:
        """Send all of it.

        Args:
            message: for :func:`dumps`.
            idle: called now and then while the other end does not read; raises to give up, after which the line is
                of no more use.

        Raises:
            OSError: the other end is closed.
        """
        data = dumps(message)
        with self._sending:
            for part in (_LENGTH.pack(len(data)), data):
                left = memoryview(part)
                while left:
                    try:
                        left = left[self._connection.send(left) :]
                    except TimeoutError:
                        idle()

    def receive(self, idle: Callable[[], None] = lambda: None) -> Any:
        """The next message.

        Args:
            idle: called now and then while nothing comes; raises to give up.

        Raises:
            EOFError: the other end is closed.
            OSError: it broke.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, idle))
        return loads(self._read(length, idle))

    def close(self) -> None:
        self._connection.close()

    def _read(self, size: int, idle: Callable[[], None]) -> bytearray:
        data = bytearray(size)
        left = memoryview(data)
        while left:
            try:
                count = self._connection.recv_into(left)
            except TimeoutError:
                idle()
                continue
            if count == 0:
                raise EOFError("The other process has closed the connection.")
            left = left[count:]
        return data
