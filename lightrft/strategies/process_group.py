"""How the process group of a run is made and left."""

from __future__ import annotations

import atexit
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
_GLOO = "pt_gloo_runloop"  # torch's name for the threads that do gloo's collectives
_MOMENT = 0.001  # seconds


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
    late = True
    while late:
        time.sleep(_MOMENT)  # without the lock: who waited for it is running now, or has been
        late = any(_is_running(thread) for thread in Path("/proc/self/task").glob("*"))


def _is_running(thread: Path) -> bool:
    """Whether a thread is one of gloo's and does not rest. Of Linux; elsewhere there is nothing to see."""
    with suppress(OSError):  # it has ended
        if (thread / "comm").read_text().strip() == _GLOO:
            return (thread / "stat").read_text().rpartition(") ")[2][0] != "S"
    return False
