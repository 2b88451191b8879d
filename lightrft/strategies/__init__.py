"""How models lie over ranks, behind one surface (:class:`Sharding`)."""

from __future__ import annotations

from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lightrft.strategies.base import Sharding
from lightrft.strategies.replicated import Replicated

__all__ = ["Replicated", "Sharding", "check_strategy", "sharding_of"]

_NAMES = ("auto", "ddp")


def check_strategy(strategy: str | Strategy) -> None:
    """Refuse, before any process starts, what the loop cannot run.

    Raises:
        ValueError: names what is offered.
    """
    if strategy not in _NAMES and not isinstance(strategy, (DDPStrategy, SingleDeviceStrategy)):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ValueError(f"trainer.strategy={name!r} is not supported; use one of {', '.join(_NAMES)}.")


def sharding_of(fabric: Fabric) -> Sharding:
    """The surface for the strategy that Fabric chose."""
    check_strategy(fabric.strategy)
    return Replicated(fabric)
