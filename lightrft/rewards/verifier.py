"""Worker processes that compare model answers with references, where hostile text can do no harm."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from enum import Enum
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from lightrft.whereabouts import mark

_PROGRAM = Path(__file__).with_name("verify_worker.py")
_MEMORY_BYTES = 1 << 30
_RETIRE_BYTES = _MEMORY_BYTES // 2  # a worker past this is replaced after its answer
_SECONDS_TO_START = 300.0  # many ranks importing sympy from one network file system take minutes
_ITEMS_PER_TRIP = 16
_BYTES_PER_TRIP = 1 << 15  # what is sent fits the pipe, so that sending never waits for a worker
# Nothing secret: the worker reads hostile text.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "VIRTUAL_ENV")


class Verdict(Enum):
    RIGHT = "right"
    WRONG = "wrong"
    TIMEOUT = "timeout"
    DEATH = "death"
    """The worker ended on this item: out of memory in a C library, a crashed interpreter."""


class Claim(NamedTuple):
    """A text that claims to hold the reference: it *is* the answer (``boxed``), or its last expression is."""

    reference: str
    text: str
    boxed: bool


class Verifier:
    """Worker processes, started when first needed and reused.

    Args:
        workers: how many processes at most.
        seconds: wall time one claim may take; then its worker is killed and another one started.
    """

    def __init__(self, workers: int, seconds: float) -> None:
        self.workers = workers
        self.seconds = seconds
        self.owner = os.getpid()
        self._running: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end, self._running, self.owner)

    def verify(self, claims: Sequence[Claim]) -> list[Verdict]:
        """One verdict per claim, in order. Equal claims are verified once.

        Raises:
            RuntimeError: a worker could not start; says why.
        """
        unique = list(dict.fromkeys(claims))
        with self._lock:
            try:
                verdicts = dict(zip(unique, self._verify(unique)))
            except BaseException:
                self._end()  # verdicts still under way must not be taken for those of the next call
                raise
        return [verdicts[claim] for claim in claims]

    def close(self) -> None:
        """End the worker processes; the next :meth:`verify` starts new ones."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        _end(self._running, self.owner)

    def _verify(self, claims: list[Claim]) -> list[Verdict]:
        messages = [json.dumps(claim) for claim in claims]
        verdicts: dict[int, Verdict] = {}
        todo = deque(range(len(claims)))
        while len(verdicts) < len(claims):
            self._feed(todo, messages)
            self._collect(todo, verdicts)
        return [verdicts[index] for index in range(len(claims))]

    def _feed(self, todo: deque[int], messages: list[str]) -> None:
        """Give idle workers something to do, starting workers while there is more to do than they are."""
        for worker in [worker for worker in self._running if worker.died_idle()]:
            self._running.remove(worker)
            worker.end()
        while len(self._running) < min(self.workers, len(todo)):
            self._running.append(_Worker(self.seconds))
        share = min(_ITEMS_PER_TRIP, math.ceil(len(todo) / self.workers))
        for worker in self._running:
            if todo and worker.ready and not worker.jobs:
                worker.send(_take(todo, messages, share), messages)

    def _collect(self, todo: deque[int], verdicts: dict[int, Verdict]) -> None:
        """Wait until a worker says something, or is over its time; take what it says, or end it."""
        expected = [worker for worker in self._running if worker.jobs or not worker.ready]
        remaining = min(worker.deadline for worker in expected) - time.monotonic()
        heard = wait([worker.output.fileno() for worker in expected], max(0.0, remaining))
        mark()
        for worker in expected:
            alive = worker.receive(verdicts) if worker.output.fileno() in heard else worker.in_time(verdicts)
            if not alive:
                self._running.remove(worker)
                todo.extend(worker.jobs)
                worker.end()


class _Worker:
    """One process as seen from ours.

    Attributes:
        jobs: indices of the claims it was sent and has not answered, in order.
        deadline: when the answer that comes next is too late (``time.monotonic`` seconds).
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ready = False
        self.jobs: deque[int] = deque()
        self.deadline = time.monotonic() + _SECONDS_TO_START
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, "PYTHONHASHSEED": "0"},  # sympy's order of terms is the same in every run
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.input, self.output, self.errors = self.process.stdin, self.process.stdout, self.process.stderr
        self._write(
            json.dumps(
                {"path": sys.path, "memory_bytes": _MEMORY_BYTES, "retire_bytes": _RETIRE_BYTES, "seconds": seconds}
            )
        )

    def died_idle(self) -> bool:
        """Something other than a claim ended it (the machine ran out of memory): no claim may be blamed."""
        return self.ready and not self.jobs and self.process.poll() is not None

    def send(self, jobs: list[int], messages: list[str]) -> None:
        self.jobs.extend(jobs)
        self.deadline = time.monotonic() + self.seconds
        self._write(f"[{','.join(messages[job] for job in jobs)}]")

    def receive(self, verdicts: dict[int, Verdict]) -> bool:
        """Take what the worker says. ``False``: it has ended."""
        said = os.read(self.output.fileno(), 4096)
        for letter in said.decode("latin-1"):
            if not self.ready:
                self.ready = True
            elif letter == "x" or not self.jobs:
                return False
            else:
                verdicts[self.jobs.popleft()] = Verdict.RIGHT if letter == "1" else Verdict.WRONG
            self.deadline = time.monotonic() + self.seconds
        if not said and not self.ready:
            raise RuntimeError(f"The worker process of math-verify could not start: {self._last_words()}")
        if not said and self.jobs:
            verdicts[self.jobs.popleft()] = Verdict.DEATH
        return bool(said)

    def in_time(self, verdicts: dict[int, Verdict]) -> bool:
        """``False``: it has taken too long over its next answer, which is settled so."""
        if time.monotonic() < self.deadline:
            return True
        if not self.ready:
            raise RuntimeError(
                f"The worker process of math-verify did not start in {_SECONDS_TO_START:.0f} s; "
                "is the file system Python is installed on overloaded?"
            )
        verdicts[self.jobs.popleft()] = Verdict.TIMEOUT
        return False

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.input, self.output, self.errors):
            stream.close()

    def _write(self, line: str) -> None:
        try:
            data = memoryview(line.encode("ascii") + b"\n")
            while data:
                data = data[self.input.write(data) or 0 :]
        except BrokenPipeError:
            pass  # it has died; reading from it says so next

    def _last_words(self) -> str:
        self.process.kill()
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with exit status {self.process.wait()}."


def _take(todo: deque[int], messages: list[str], share: int) -> list[int]:
    """The next jobs for one worker: at least one, at most ``share``, within the pipe's room."""
    jobs = [todo.popleft()]
    room = _BYTES_PER_TRIP - len(messages[jobs[0]])
    while todo and len(jobs) < share and len(messages[todo[0]]) < room:
        room -= len(messages[todo[0]]) + 1
        jobs.append(todo.popleft())
    return jobs


def _end(running: list[_Worker], owner: int) -> None:
    """End the workers, in the process that started them only: a forked copy of it has no say."""
    if os.getpid() == owner:
        for worker in running:
            worker.end()
    running.clear()
