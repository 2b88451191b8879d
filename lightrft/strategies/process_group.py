"""How the process group of a run is made and left."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric import Fabric

from lightrft.strategies.gloo_threads import await_gloo

# Of a collective, until the watch over ranks takes over (trainer.timeout_seconds).
TIMEOUT = timedelta(minutes=30)


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
        outlast_gloo()  # which comes first: a destroyed group ends with who still holds it, DDP's destructor say


def outlast_gloo() -> None:
    """Have the interpreter end only when gloo's threads rest, however the run ends."""
    _at_exit(await_gloo)


def _at_exit(work: Callable[[], None]) -> None:
    """Once, and before what was registered earlier."""
    atexit.unregister(work)
    atexit.register(work)


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
