"""The process that an engine has for itself: a fresh interpreter, spoken to, watched, and ended with all it started."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import lightrft
from lightrft.engines.base import EngineError
from lightrft.engines.process.messages import Line
from lightrft.engines.process.worker import Answer, Bucket, Call, Progress
from lightrft.whereabouts import mark

# The current folder is no place to look for modules first.
_MAIN = "import sys; sys.path[:] = filter(None, sys.path); from lightrft.engines.process.worker import main; main()"
# What a launcher tells a rank; the engine's process is none, and libraries would believe it.
_OF_RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK"}
_OF_RANKS |= {"ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_LAST_WORDS, _LAST_LINES = 8000, 20  # bytes and lines of stderr
_SECONDS_TO_DIE = 2.0  # from the end of its connection
_SECONDS_TO_LEAVE = 10.0  # once closed


class EngineProcess:
    """Runs :mod:`lightrft.engines.process.worker`.

    Args:
        python: the interpreter.
        site: folders that come first where it looks for modules, LightRFT itself apart.
        timeout_seconds: longest wait without progress.

    Attributes:
        folder: temporary files of both processes.
        shared: descriptor of an anonymous file that both have.
        epitaph: how it ended; ``None`` while it runs.

    Raises:
        EngineError: there is no such interpreter.
    """

    def __init__(self, python: str, site: Sequence[str], timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.epitaph: str | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="lightrft-engine-"))
        self.shared = os.memfd_create("lightrft-weights")
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        self._talking: int | None = None  # the thread that holds the lock
        self._closing = False
        ours, theirs = socket.socketpair()
        self._line = Line(ours)
        modules, temporary = self.folder / "modules", self.folder / "tmp"
        modules.mkdir()
        temporary.mkdir()
        # LightRFT alone, and not whatever else lies beside it.
        (modules / "lightrft").symlink_to(Path(lightrft.__file__).parent, target_is_directory=True)
        try:
            self._process = subprocess.Popen(
                [python, "-c", _MAIN, *map(str, (theirs.fileno(), self.shared, os.getpid(), self.folder))],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(python, [str(modules), *site], temporary),
                pass_fds=(theirs.fileno(), self.shared),
                start_new_session=True,  # Ctrl-C is the trainer's; and its group is ended as one
            )
        except OSError as error:
            self._free()
            raise EngineError(f"{python!r} is no Python interpreter: {error}; set OwnProcess's python.") from error
        finally:
            theirs.close()
        self._words = _Words(self._process.stderr)

    @contextmanager
    def conversation(self, method: str) -> Iterator[None]:
        """No other thread talks with the process meanwhile; whatever breaks it off ends the process.

        Args:
            method: what they talk about, for messages.

        Raises:
            EngineError: the process died, made no progress, or had ended before; says why.
        """
        if self._talking == threading.get_ident():
            raise EngineError(f"{method}() was called within this thread's push; call it before or after.")
        with self._lock:
            self._talking = threading.get_ident()
            try:
                self._begin()
                yield
            except _GoneError:
                self._bury(f"{self._death()} during {method}()")
                raise EngineError(self.epitaph) from None
            except _StuckError:
                self._bury(
                    f"made no progress for {self.timeout_seconds:g} seconds during {method}() and was killed; if that "
                    "may take longer, raise OwnProcess's timeout_seconds"
                )
                raise EngineError(self.epitaph) from None
            except BaseException as error:
                if self.epitaph is None:
                    self._bury(f"was killed when {type(error).__name__} broke {method}() off")
                raise
            finally:
                self._talking = None

    def ask(self, method: str, *arguments: Any) -> Answer:
        """Inside a :meth:`conversation`: have a method of the engine run."""
        self.send(Call(method, arguments))
        answer = self.receive()
        assert isinstance(answer, Answer)
        return answer

    def send(self, message: Call | Bucket) -> None:
        """Inside a :meth:`conversation`."""
        try:
            self._line.send(message, self._check)
        except OSError as error:
            raise _GoneError from error

    def receive(self) -> Answer | Progress:
        """Inside a :meth:`conversation`: an answer, or word of a bucket."""
        while True:
            try:
                message: Answer | Progress = self._line.receive(self._check)
            except (EOFError, OSError) as error:
                raise _GoneError from error
            self._heard = time.monotonic()
            mark()
            if isinstance(message, Answer) or message.bucket:
                return message

    def end(self) -> Answer | None:
        """Close the engine and end its process. A call under way in another thread is broken off.

        Returns:
            what the engine answered, if it did.
        """
        if self._lock.locked():
            self._closing = True
            self._kill()
        self.timeout_seconds = min(self.timeout_seconds, _SECONDS_TO_LEAVE)
        try:
            with self.conversation("close"):
                answer = self.ask("close")
        except EngineError:  # it had died, or does so now
            return None
        self._awaited_exit_code(_SECONDS_TO_LEAVE)
        self._bury("was closed")
        return answer

    # --- life and death ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.epitaph is None and self._exit_code() is not None:
            self._bury(f"{self._death()} between calls")
        if self.epitaph is not None:
            raise EngineError(self.epitaph)
        self._heard = time.monotonic()

    def _check(self) -> None:
        if self._exit_code() is not None:
            raise _GoneError
        if time.monotonic() - self._heard > self.timeout_seconds:
            raise _StuckError

    def _exit_code(self) -> int | None:
        """Negative if a signal's; ``None`` while it runs. Left unreaped: its number must not become another's yet."""
        try:
            end = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # reaped elsewhere
            return self._process.wait()
        if end is None:
            return None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def _awaited_exit_code(self, seconds: float) -> int | None:
        until = time.monotonic() + seconds
        while (code := self._exit_code()) is None and time.monotonic() < until:
            time.sleep(0.01)
        return code

    def _death(self) -> str:
        """How it ended; the connection says so a little earlier than the kernel."""
        if self._closing:
            return "was closed"
        code = self._awaited_exit_code(_SECONDS_TO_DIE)
        if code is None:
            return "closed its connection"
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        likely = " (the kernel's, if memory ran out)" if -code == signal.SIGKILL else ""
        return f"was killed by {name}{likely}"

    def _bury(self, how: str) -> None:
        self._kill()
        with suppress(subprocess.TimeoutExpired):  # the kernel itself may hold on to it
            self._process.wait(_SECONDS_TO_LEAVE)
        words = self._words.last()
        self.epitaph = f"The engine's process {how}; start() the engine anew."
        if words:
            self.epitaph += f" Its last words were:\n{words}"
        self._free()

    def _kill(self) -> None:
        # Before it is reaped, and with it all that it started.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _free(self) -> None:
        self._line.close()
        os.close(self.shared)
        shutil.rmtree(self.folder, ignore_errors=True)


class _GoneError(Exception):
    """The process has died or hung up."""


class _StuckError(Exception):
    """The process has made no progress for too long."""


class _Words(threading.Thread):
    """Passes stderr on, and keeps its end."""

    def __init__(self, stderr: IO[bytes] | None) -> None:
        super().__init__(name="stderr of the engine's process", daemon=True)
        assert stderr is not None
        self._stderr, self._tail = stderr, b""
        self.start()

    def run(self) -> None:
        with self._stderr:
            while words := os.read(self._stderr.fileno(), 1 << 16):
                self._tail = (self._tail + words)[-_LAST_WORDS:]
                with suppress(OSError):  # this process has none
                    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, words)

    def last(self) -> str:
        """Its last lines, once the process is dead."""
        self.join(_SECONDS_TO_DIE)
        lines = self._tail.decode(errors="replace").splitlines()
        return "\n".join(lines[-_LAST_LINES:])


def _environment(python: str, folders: Sequence[str], temporary: Path) -> dict[str, str]:
    """This process's, less what makes it a rank, with ``folders`` first on the path of modules.

    Temporary files lie in ``temporary``, which goes with the process; what torch compiles outlives it, for the next.
    """
    inherited = sys.path if python == sys.executable else os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(filter(None, [*folders, *inherited]))
    compiled = os.path.join(tempfile.gettempdir(), f"lightrft-compiled-{os.getuid()}")
    kept = {k: v for k, v in os.environ.items() if k not in _OF_RANKS and not k.startswith("TORCHELASTIC_")}
    return {"TORCHINDUCTOR_CACHE_DIR": compiled, **kept, "PYTHONPATH": path, "TMPDIR": str(temporary)}
