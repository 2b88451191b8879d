"""The watch over ranks: one that dies, fails or hangs ends the job, and every rank says which one it was and where.

Each rank has a thread that tells rank 0's how far its main thread is (:mod:`lightrft.whereabouts`), over a connection
of its own: the kernel closes it when a process ends, however it ends, and a main thread stuck in a collective or in a
callback keeps nobody from speaking or listening. Rank 0's thread judges (:mod:`lightrft.verdicts`); if rank 0 itself is
gone, each of the others sees that by itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from lightning.fabric import Fabric

from lightrft.strategies import let_collectives_last, unfinished_collective
from lightrft.verdicts import Report, sentence, to_blame
from lightrft.whereabouts import here, mark

_Message = dict[str, Any]
_LONGEST_COLLECTIVE = 86400.0  # seconds, should the watch itself fail
_SECONDS_TO_ANSWER = 2.0
_SECONDS_TO_FAIL_ALIKE = 5.0  # an error of the configuration comes on all ranks, not quite at once
_SECONDS_TO_CLOSE = 10.0
_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class Watchdog:
    """Has this rank watched by the others, and them by it, from :meth:`start` to :meth:`close`; alone it does nothing.

    Args:
        timeout_seconds: how long a rank may go without marking progress, unless it waits for others that do;
            ``None`` is no watch.

    Raises:
        ValueError: a time of 0 or less.
    """

    def __init__(self, timeout_seconds: float | None) -> None:
        if timeout_seconds is not None and not timeout_seconds > 0:
            raise ValueError(f"trainer.timeout_seconds is {timeout_seconds}; it must be above 0, or null for no watch.")
        self.timeout_seconds = timeout_seconds
        self._watch: _Judge | _Witness | None = None

    def start(self, fabric: Fabric) -> None:
        """Connect the ranks of a launched Fabric. Collective."""
        self.enter("set-up", 0)
        if self.timeout_seconds is None or fabric.world_size == 1:
            return
        judge = _Judge(fabric.world_size, self.timeout_seconds) if fabric.is_global_zero else None
        address: Any = fabric.broadcast(judge.address if judge else None)
        self._watch = judge or _Witness(fabric.global_rank, self.timeout_seconds, *address)
        self._watch.start()

    def take_over(self) -> None:
        """From here on a collective may last as long as any rank makes progress.

        The process groups' own timeouts, which cannot tell a slow rank from a stuck one, give way.
        """
        if self._watch:
            let_collectives_last(_LONGEST_COLLECTIVE)

    def enter(self, phase: str, iteration: int) -> None:
        """The main thread is in another phase; the other ranks know it when this returns."""
        here.phase, here.iteration = phase, iteration
        mark("")
        if self._watch:
            self._watch.tell()

    def failed(self, error: BaseException) -> None:
        """The main thread leaves the run by an error, which it may raise when this returns.

        By then the others know it; where the error is but the consequence of another rank's end, this rank has said
        so. Leaving may take ``timeout_seconds``, then the process is ended.
        """
        if self._watch:
            self._watch.fail(f"{type(error).__name__}: {error}".splitlines()[0])
            if isinstance(error, Exception):
                self._watch.judged.wait(_SECONDS_TO_FAIL_ALIKE + 2 * _SECONDS_TO_ANSWER)

    def close(self) -> None:
        """The run is over on all ranks, or this one is past an error."""
        if self._watch:
            self._watch.close()
        self._watch = None


class _Line:
    """Messages over a socket, one JSON object a line; for use by two threads."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(_SECONDS_TO_ANSWER)  # a peer that never reads may not hold its sender up
        _open.add(connection)
        self._lock = threading.Lock()
        self._received = b""

    def send(self, **message: Any) -> None:
        with suppress(OSError), self._lock:  # the peer has ended, which reading says
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[_Message] | None:
        """What has come, ``None`` at the end of the connection. Call where there is something to read."""
        try:
            received = self.connection.recv(1 << 16)
            *lines, self._received = (self._received + received).split(b"\n")
            return [json.loads(line) for line in lines] if received else None
        except (OSError, ValueError):  # broken, or whoever is at the other end is none of us
            return None


class _Watch(threading.Thread):
    """What judge and witness share.

    Attributes:
        judged: set when this rank knows why it fails, or that all fail alike.
    """

    def __init__(self, rank: int, timeout: float) -> None:
        super().__init__(name="watch over ranks", daemon=True)
        self.rank, self.timeout = rank, timeout
        self.interval = min(5.0, timeout / 10)
        self.judged = threading.Event()
        self.error: str | None = None
        self.closing = threading.Event()
        self.selector = selectors.DefaultSelector()
        self._waking, self._alarm = socket.socketpair()
        _open.update((self._waking, self._alarm))
        self.selector.register(self._alarm, selectors.EVENT_READ)

    # --- from the main thread ----------------------------------------------------------------------------------------

    def tell(self) -> None:
        raise NotImplementedError

    def fail(self, error: str) -> None:
        self.error = error
        self.tell()
        self.wake()

    def close(self) -> None:
        self.closing.set()
        self.wake()
        self.join(_SECONDS_TO_CLOSE)

    def wake(self) -> None:
        with suppress(OSError):  # the thread has gone
            self._waking.send(b".")

    # --- from the thread ---------------------------------------------------------------------------------------------

    def ready(self) -> Iterable[Any]:
        """What can be read from, after at most an interval; nothing if the main thread rang."""
        for key, _ in self.selector.select(self.interval):
            if key.fileobj is self._alarm:
                self._alarm.recv(1 << 10)
            else:
                yield key.data

    def report(self, thorough: bool = False) -> Report:
        """This rank's own; ``thorough`` looks up what it waits in."""
        report = Report(self.rank, _process(), here.phase, here.iteration, here.doing, time.monotonic() - here.since)
        report.error = self.error
        if thorough:
            try:
                report.collective = unfinished_collective()
                report.may_wait = report.collective is not None
            except LookupError:
                report.may_wait = True
        return report

    def end(self, verdict: str, blamed: list[int]) -> None:
        """Say why the job ends, and end this process: at once, unless its main thread is about to."""
        own_error = self.error is not None
        if not (own_error and self.rank in blamed):  # its traceback says more
            _say(f"[rank {self.rank}] {verdict}")
        if self.rank in blamed and not own_error:
            _say(f"[rank {self.rank}] The main thread of this rank stands at:\n{_main_stack()}")
        self.judged.set()
        if not (own_error and self.closing.wait(self.timeout)):
            _exit()

    def finish(self) -> None:
        self.selector.close()
        for one in (self._waking, self._alarm):
            one.close()


class _Witness(_Watch):
    """A rank other than 0: tells its place, does as the judge says."""

    def __init__(self, rank: int, timeout: float, host: str, port: int, token: str) -> None:
        super().__init__(rank, timeout)
        try:
            connection = socket.create_connection((host, port), timeout=60)
        except OSError as error:
            raise ConnectionError(
                f"Rank {rank} cannot reach rank 0's watch at {host}:{port} ({error}); let the nodes connect to each "
                "other on any port, or set trainer.timeout_seconds to null."
            ) from error
        self.line = _Line(connection)
        self.line.send(kind="hello", token=token, report=asdict(self.report()))
        self.selector.register(connection, selectors.EVENT_READ, self.line)
        self.judge = Report(0)
        self.heard = time.monotonic()

    def tell(self) -> None:
        self.line.send(kind="report", report=asdict(self.report(thorough=self.error is not None)))

    def run(self) -> None:
        told = 0.0
        while not self.closing.is_set():
            for line in self.ready():
                messages = line.receive()
                if messages is None:
                    return self._judge_alone(died=True)
                for message in messages:
                    if message["kind"] == "verdict":
                        return self._obey(message)
                    self._listen(message)
            if time.monotonic() - self.heard > self.timeout:
                return self._judge_alone(died=False)
            if time.monotonic() - told > self.interval:
                self.tell()
                told = time.monotonic()
        self._say_goodbye()

    def _listen(self, message: _Message) -> None:
        self.heard = time.monotonic()
        if message["kind"] == "ask":
            self.line.send(kind="answer", report=asdict(self.report(thorough=True)))
        else:
            self.judge = Report(**message["report"])

    def _obey(self, message: _Message) -> None:
        if message["text"]:
            self.end(message["text"], message["blamed"])
        self.judged.set()
        self.finish()

    def _judge_alone(self, died: bool) -> None:
        """Rank 0 is gone, and with it what is known of the others."""
        idle = self.judge.idle + time.monotonic() - self.heard
        judge = replace(self.judge, died=died and self.judge.error is None, answers=False, idle=idle)
        self.end(sentence([judge, self.report(thorough=True)], [judge], self.timeout), [0])
        self.finish()

    def _say_goodbye(self) -> None:
        """Leave in such a way that no word of either side is lost: the judge closes first."""
        if self.error is None:
            self.line.send(kind="done")
            self.line.connection.settimeout(_SECONDS_TO_CLOSE)
            with suppress(OSError):
                self.line.connection.shutdown(socket.SHUT_WR)
            while self.line.receive() is not None:
                pass
        self.line.connection.close()
        self.finish()


class _Judge(_Watch):
    """Rank 0: collects what the ranks say of themselves, and says who ends the job.

    Attributes:
        address: host, port and token by which the others find it.
    """

    def __init__(self, world_size: int, timeout: float) -> None:
        super().__init__(0, timeout)
        self._door = _listening_socket()
        _open.add(self._door)
        self._token = secrets.token_hex(16)
        self.address = (os.environ.get("MASTER_ADDR", "127.0.0.1"), self._door.getsockname()[1], self._token)
        self.selector.register(self._door, selectors.EVENT_READ, self._door)
        now = time.monotonic()
        self.reports = {rank: Report(rank) for rank in range(1, world_size)}
        self.heard = dict.fromkeys(self.reports, now)
        self.lines: dict[int, _Line] = {}
        self._unanswered: set[int] = set()
        self._asked: float | None = None
        self._asks_again = 0.0

    def tell(self) -> None:
        report = asdict(self.report())
        for line in list(self.lines.values()):
            line.send(kind="report", report=report)

    def run(self) -> None:
        told = 0.0
        while self.reports or not self.closing.is_set():
            for source in self.ready():
                self._accept() if source is self._door else self._hear(source)
            if self._decide():
                return
            if self.closing.is_set() and self.error is not None:
                break
            if time.monotonic() - told > self.interval:
                self.tell()
                told = time.monotonic()
        self.finish()

    def finish(self) -> None:
        super().finish()
        for one in [self._door, *(line.connection for line in self.lines.values())]:
            one.close()

    # --- listening ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        connection, _ = self._door.accept()
        self.selector.register(connection, selectors.EVENT_READ, _Line(connection))

    def _hear(self, line: _Line) -> None:
        messages = line.receive()
        rank = next((rank for rank, known in self.lines.items() if known is line), None)
        for message in messages or []:
            if rank is None:
                if message.get("token") != self._token:
                    messages = None  # not one of ours
                    break
                rank = message["report"]["rank"]
                self.lines[rank] = line
            self._note(rank, message)
        if messages is None:
            self._hang_up(rank, line)

    def _note(self, rank: int, message: _Message) -> None:
        if message["kind"] == "done":
            self.reports.pop(rank, None)
            return
        self.heard[rank] = time.monotonic()
        before, self.reports[rank] = self.reports[rank], (report := Report(**message["report"]))
        if message["kind"] == "report" and report.idle > before.idle:  # still where it has said more of
            report.collective, report.may_wait = report.collective or before.collective, before.may_wait
        if message["kind"] == "answer" or report.error is not None:
            self._unanswered.discard(rank)

    def _hang_up(self, rank: int | None, line: _Line) -> None:
        self.selector.unregister(line.connection)
        line.connection.close()
        if rank is not None:
            self.lines.pop(rank)
            if rank in self.reports:
                self.reports[rank].died = self.reports[rank].error is None
                self._unanswered.discard(rank)

    # --- judging -----------------------------------------------------------------------------------------------------

    def _decide(self) -> bool:
        """Judge where there is something to judge and all has been heard. ``True``: the watch is over."""
        if not to_blame(self._everyone(thorough=False), self.timeout) and self.error is None:
            self._asked = None
            return False
        now = time.monotonic()
        if self._asked is None:
            if now < self._asks_again:
                return False
            self._asked, self._unanswered = now, set(self.lines)
            for line in self.lines.values():
                line.send(kind="ask")
        everyone = self._everyone(thorough=True)
        if now - self._asked < self._patience(everyone):
            return False
        blamed = to_blame(everyone, self.timeout)
        alike = all(one.error is not None for one in everyone)
        if not blamed and not alike:
            self._asked, self._asks_again = None, now + self.interval  # a slow rank that moves
            return False
        text = "" if alike else sentence(everyone, blamed, self.timeout)
        self._pronounce(text, [one.rank for one in blamed])
        return True

    def _everyone(self, thorough: bool) -> list[Report]:
        now = time.monotonic()
        others = [
            replace(
                report,
                idle=report.idle + now - self.heard[rank],
                answers=not thorough or rank not in self._unanswered,
            )
            for rank, report in self.reports.items()
        ]
        return [self.report(thorough), *others]

    def _patience(self, everyone: list[Report]) -> float:
        """How long to wait for answers, and where ranks fail for the others to fail alike."""
        if any(one.error is not None for one in everyone) and not any(one.died for one in everyone):
            return 0.0 if all(one.error is not None for one in everyone) else _SECONDS_TO_FAIL_ALIKE
        return _SECONDS_TO_ANSWER if self._unanswered else 0.0

    def _pronounce(self, text: str, blamed: list[int]) -> None:
        for line in self.lines.values():
            line.send(kind="verdict", text=text, blamed=blamed)
        if text:
            self._see_off()
            self.end(text, blamed)
        self.judged.set()
        self.finish()

    def _see_off(self) -> None:
        """Let the others read the verdict before this process ends; their closing says that they have."""
        deadline = time.monotonic() + _SECONDS_TO_ANSWER
        while self.lines and time.monotonic() < deadline:
            for source in self.ready():
                if source is not self._door:
                    self._hear(source)


def _forget() -> None:
    """In a forked child, whose copies would keep a connection open that its rank's death closes."""
    for one in list(_open):
        one.close()


os.register_at_fork(after_in_child=_forget)


def _listening_socket() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _main_stack() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame))


def _say(text: str) -> None:
    """To standard error, past whatever lock a stuck main thread holds."""
    os.write(2, f"{text}\n".encode(errors="replace"))


def _exit() -> None:
    """End this process and the workers of its engines, whatever the main thread is stuck in."""
    for child in (children := multiprocessing.active_children()):
        child.terminate()
    for child in children:
        child.join(1)
        child.kill()
        child.join(1)
    # Other workers (graders) end when the pipes to this process do.
    os._exit(1)
