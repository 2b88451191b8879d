"""How models lie over ranks, behind one surface (:class:`Sharding`)."""

from __future__ import annotations

import atexit

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lightrft.strategies.base import Sharding
from lightrft.strategies.replicated import Replicated

__all__ = ["Replicated", "Sharding", "check_strategy", "leave_together", "sharding_of"]

_NAMES = ("auto", "ddp")


def check_strategy(strategy: str | Strategy) -> None:
    """Refuse, before any process starts, what the loop cannot run.

    Raises:
        ValueError: names what is offered.
    """
    if strategy not in _NAMES and not isinstance(strategy, (DDPStrategy, SingleDeviceStrategy)):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ValueError(f"trainer.strategy={name!r} is not supported; use one of {', '.join(_NAMES)}.")


def leave_together(fabric: Fabric) -> None:
    """Wait for all ranks, and have the process group destroyed when the process ends: left alone, exits are unclean.

    For a run that went well; after an error no rank may wait for another.
    """
    if dist.is_initialized():
        fabric.barrier()
        atexit.unregister(_destroy_process_group)
        atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sharding_of(fabric: Fabric) -> Sharding:
    """The surface for the strategy that Fabric chose."""
    check_strategy(fabric.strategy)
    return Replicated(fabric)
