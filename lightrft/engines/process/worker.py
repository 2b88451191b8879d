"""What runs in an engine's own process (:class:`~lightrft.engines.OwnProcess`): serves one engine to one trainer."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightrft.engines.base import Engine, EngineError
from lightrft.engines.buckets import Piece, unpacked
from lightrft.engines.process import shared_memory
from lightrft.engines.process.failures import Failure
from lightrft.engines.process.messages import Line
from lightrft.engines.process.names import Names
from lightrft.ops.fingerprint import Fingerprint
from lightrft.whereabouts import here

_SECONDS_BETWEEN_LOOKS = 0.25


class Call(NamedTuple):
    """To the worker: run a method of the engine."""

    method: str
    arguments: tuple[Any, ...]


class Bucket(NamedTuple):
    """To the worker, inside a push: what is in the next bucket.

    Attributes:
        pieces: ``None`` after the last.
        broken: the source of the weights has failed; there will be no more.
    """

    pieces: list[Piece] | None
    broken: bool = False


class Progress(NamedTuple):
    """From the worker: a part of a call is done.

    Attributes:
        bucket: it is a bucket of weights, which may be filled again.
    """

    bucket: bool = False


class Answer(NamedTuple):
    """From the worker: a call is over, and where the engine is after it."""

    result: Any
    failure: Failure | None
    dtype: torch.dtype | None
    weight_version: int


class Worker:
    """Answers the calls of the process that started it, and does not outlive it.

    Args:
        line: to that process.
        shared: descriptor of the file for weights in host memory.
        parent: that process's id.
        folder: temporary files of both.
    """

    def __init__(self, line: Line, shared: int, parent: int, folder: Path) -> None:
        self._line, self._shared, self._parent, self._folder = line, shared, parent, folder
        self._engine = Engine()
        self._device = torch.device("cpu")
        self._names = Names({})
        self._own: dict[str, Callable[..., Any]] = {
            "start": self._start,
            "push": self._push,
            "fingerprint": self._fingerprint,
        }

    def serve(self) -> None:
        """Return when the engine has been closed."""
        threading.Thread(target=self._look_around, daemon=True).start()
        method = ""
        while method != "close":
            message = self._receive()
            if isinstance(message, Call):  # else a bucket for an update that has failed
                method = message.method
                self._send(self._answer(message))

    def _answer(self, call: Call) -> Answer:
        result, failure = None, None
        try:
            method = self._own.get(call.method) or getattr(self._engine, call.method)
            result = method(*call.arguments)
        except Exception as error:
            failure = Failure.of(error)
        return Answer(result, failure, self._engine.dtype, self._engine.weight_version)

    def _start(self, engine: bytes, device: torch.device, threads: int) -> tuple[frozenset[str], frozenset[str]]:
        """What the engine does not keep as it is pushed: ``in_float8`` and ``dropped``."""
        import transformers

        torch.set_num_threads(threads)
        self._device = device
        self._engine = pickle.loads(engine)
        config = transformers.AutoConfig.from_pretrained(self._folder / "config", local_files_only=True)
        folder = self._folder / "tokenizer"
        auto: Any = transformers.AutoTokenizer
        if (folder / "processor_config.json").exists():
            auto = transformers.AutoProcessor
        self._engine.start(config, auto.from_pretrained(folder, local_files_only=True), device)
        if (names := self._folder / "names.json").exists():
            self._names = Names.read(names, config)
        in_float8, dropped = (map(self._names.there, own) for own in (self._engine.in_float8, self._engine.dropped))
        return frozenset(in_float8), frozenset(dropped)

    def _push(
        self, method: str, first: tuple[Any, ...], version: int, size: int, key: bytes | None, buckets: int
    ) -> None:
        with shared_memory.taken(size, self._device, self._shared, key) as memory:

            def done() -> None:
                shared_memory.settle(memory)
                self._send(Progress(bucket=True))

            arriving = unpacked(self._next_bucket, done, memory.chunk(buckets))
            tensors = ((self._names.here(name), tensor) for name, tensor in arriving)
            getattr(self._engine, method)(*first, tensors, version)

    def _fingerprint(self, names: list[str]) -> dict[str, Fingerprint]:
        found = self._engine.fingerprint([self._names.here(name) for name in names])
        return {name: found[self._names.here(name)] for name in names}

    def _next_bucket(self) -> list[Piece] | None:
        bucket: Bucket = self._receive()
        if bucket.broken:
            raise EngineError("The weights stopped coming midway.")
        return bucket.pieces

    def _receive(self) -> Any:
        try:
            return self._line.receive()
        except (EOFError, OSError):
            self._end()

    def _send(self, message: Progress | Answer) -> None:
        try:
            self._line.send(message)
        except OSError:
            self._end()

    def _look_around(self) -> None:
        """Tell of progress while there is some, and see the parent die even in the midst of a call."""
        told = here.since
        while os.getppid() == self._parent:
            if here.since != told:
                told = here.since
                self._send(Progress())
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        self._end()

    def _end(self) -> None:
        """The parent is gone, and nobody else clears up."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)  # processes of the engine's, too


def main() -> None:
    connection, shared, parent, folder = sys.argv[1:]
    Worker(Line(socket.socket(fileno=int(connection))), int(shared), int(parent), Path(folder)).serve()
