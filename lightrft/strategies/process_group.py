"""How the process group of a run is made and left."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric

# Of a collective, until the watch over ranks takes over (trainer.timeout_seconds).
TIMEOUT = timedelta(minutes=30)
# In Linux's words: torch's name for the threads that do gloo's collectives, and what is to be seen of a thread.
_GLOO, _RESTS = b"pt_gloo_runloop", b"S (sleeping)"
_WHAT_TELLS = (b"State", b"voluntary_ctxt_switches", b"nonvoluntary_ctxt_switches")
_PATIENCE = 10.0  # seconds; OpenMP's threads bear gloo's name where it starts them, and may be told never to rest
_Pulse = dict[str, tuple[bytes, ...]]


def backend_for(device: torch.device) -> str:
    """Both backends where there is a GPU: what lies on the host (offloaded shards, checkpoints) travels by gloo."""
    return "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"


def let_collectives_last(seconds: float) -> None:
    """Put the timeouts of all process groups there are to ``seconds``."""
    groups = dist.distributed_c10d
    for group in list(groups._world.pg_map) if dist.is_initialized() else []:
        groups._set_pg_timeout(timedelta(seconds=seconds), group)


def leave_together(fabric: Fabric) -> None:
    """Wait for all ranks, and have the process group destroyed when the process ends: left alone, exits are unclean.

    For a run that went well; after an error no rank may wait for another.
    """
    if dist.is_initialized():
        fabric.barrier()
        _at_exit(_destroy_process_group)
        outlast_gloo()  # before the group is destroyed, as that leaves DDP's destructor the last to hold it


def outlast_gloo() -> None:
    """Have the interpreter end only when gloo's threads have given back the tensors of collectives that are over.

    Who waits for a collective is told that it is over before that, and giving back needs the interpreter's lock. A
    thread so late that the interpreter is ending already aborts the process; one that a group's destructor waits for
    with the lock held (DDP's, which keeps the group until then) hangs it.
    """
    _at_exit(_await_gloo)


def _at_exit(work: Callable[[], None]) -> None:
    """Once, and before what was registered earlier."""
    atexit.unregister(work)
    atexit.register(work)


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _await_gloo() -> None:
    last: _Pulse = {}
    deadline = time.monotonic() + _PATIENCE
    while (now := _pulse()) != last or any(state != _RESTS for state, *_ in now.values()):
        if time.monotonic() > deadline:
            return
        last = now
        # Who waits for the lock, this thread's meanwhile, wakes once in each such interval, and so is seen to.
        time.sleep(4 * sys.getswitchinterval())


def _pulse() -> _Pulse:
    """State and context switches of each of gloo's threads. Of Linux; elsewhere there is nothing to see."""
    found = {}
    for file in Path("/proc/self/task").glob("*/status"):
        with suppress(OSError):  # the thread has ended
            fields = dict(line.split(b":\t", 1) for line in file.read_bytes().splitlines() if b":\t" in line)
            if fields[b"Name"] == _GLOO:
                found[file.parent.name] = tuple(fields[name] for name in _WHAT_TELLS)
    return found
