"""Gloo's threads: whoever waits for a collective goes on before they are done with it."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

# In Linux's words: torch's name for the threads, and what is to be seen of each.
_GLOO, _RESTS = b"pt_gloo_runloop", b"S (sleeping)"
_SEEN = (b"State", b"voluntary_ctxt_switches", b"nonvoluntary_ctxt_switches")
_PATIENCE = 10.0  # seconds; OpenMP's threads bear gloo's name where it starts them, and may be told never to rest
_Pulse = dict[str, tuple[bytes, ...]]


def await_gloo() -> None:
    """Wait until gloo's threads have given back the tensors of collectives that are over, 10 s at most.

    Giving back needs the interpreter's lock. A thread so late that the interpreter is ending already aborts the
    process; one that a group's destructor waits for with the lock held (DDP's, which keeps the group until then) hangs
    it.
    """
    last: _Pulse = {}
    deadline = time.monotonic() + _PATIENCE
    while (now := _pulse()) != last or any(state != _RESTS for state, *_ in now.values()):
        if time.monotonic() > deadline:
            return
        last = now
        # Without the lock. A thread that still cannot have it wakes after every switch interval, which counts as a
        # context switch: what did not change in several of them wants nothing.
        time.sleep(4 * sys.getswitchinterval())


def _pulse() -> _Pulse:
    """State and context switches of each thread. Of Linux; elsewhere there is nothing to see."""
    found = {}
    for file in Path("/proc/self/task").glob("*/status"):
        with suppress(OSError):  # the thread has ended
            fields = dict(line.split(b":\t", 1) for line in file.read_bytes().splitlines() if b":\t" in line)
            if fields[b"Name"] == _GLOO:
                found[file.parent.name] = tuple(fields[name] for name in _SEEN)
    return found
