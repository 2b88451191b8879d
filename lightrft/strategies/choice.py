"""A strategy by its name or object, and the Fabric that runs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.connector import _Connector
from lightning.fabric.strategies import STRATEGY_REGISTRY, SingleDeviceStrategy, Strategy

from lightrft.strategies.base import Sharding
from lightrft.strategies.fully_sharded import FSDP2, FullySharded
from lightrft.strategies.half_precision import ScaledFloat16
from lightrft.strategies.placement import Placement
from lightrft.strategies.replicated import DDP, Replicated
from lightrft.strategies.zero import DividedByZeRO, ZeRO

# "auto" is one device without a process group, or ddp.
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    "fsdp2_offload": partial(FSDP2, cpu_offload=True),
    **{f"zero{stage}": partial(ZeRO, stage=stage) for stage in (1, 2, 3)},
    **{f"zero{stage}_offload": partial(ZeRO, stage=stage, offload=True) for stage in (1, 2, 3)},
}
_NAMES = ", ".join(["auto", *STRATEGIES])
_SURFACES: dict[type[Strategy], type[Sharding]] = {
    SingleDeviceStrategy: Replicated,
    DDP: Replicated,
    FSDP2: FullySharded,
    ZeRO: DividedByZeRO,
}
_MIXED = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
_PRECISIONS = {DDP: ("64-true", *_MIXED), FSDP2: _MIXED, ZeRO: _MIXED}
_LONG_NAMES = {"32": "32-true", "64": "64-true"}


def register() -> None:
    """Make our names known to ``Fabric(strategy=...)`` too; those Fabric has keep its own meaning there."""
    for name, make in STRATEGIES.items():
        if name not in STRATEGY_REGISTRY:
            kind = make.func if isinstance(make, partial) else make
            STRATEGY_REGISTRY.register(name, kind, **(make.keywords if isinstance(make, partial) else {}))


register()


def make_fabric(strategy: str | Strategy, precision: str, **arguments: Any) -> Fabric:
    """A Fabric, not launched, of one of our strategies.

    Args:
        strategy: ``auto``, a name of :data:`STRATEGIES`, or an object of our classes.
        precision: as for Fabric; ``16-mixed`` is ours but under ZeRO.
        arguments: of :class:`lightning.fabric.Fabric`.

    Raises:
        ValueError: a strategy of Fabric's own, an unknown one, or a precision it does not have; says what to take.
    """
    _check(strategy)
    precision = _LONG_NAMES.get(precision, precision)
    chosen = "ddp" if strategy == "auto" else strategy
    made = STRATEGIES[chosen]() if isinstance(chosen, str) else chosen
    _check_precision(made, precision)
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed" and not isinstance(made, ZeRO):
        options = {"plugins": [ScaledFloat16("cuda" if _has_cuda(arguments.get("accelerator")) else "cpu")]}
    if strategy == "auto":
        # Fabric's connector knows how many devices there are: one needs no processes. A Fabric would make some.
        devices = {name: arguments[name] for name in ("accelerator", "devices", "num_nodes") if name in arguments}
        if isinstance(_Connector(**devices).strategy, SingleDeviceStrategy):
            return Fabric(**options, **arguments)
    return Fabric(strategy=made, **options, **arguments)


def launched_fabric(strategy: str | Strategy, beside: Fabric, **arguments: Any) -> Fabric:
    """A second Fabric in the processes of a launched one: another strategy for one of the models."""
    fabric = make_fabric(strategy, beside.strategy.precision.precision, **arguments)
    # Not launch(), which would start the processes again.
    fabric.strategy.setup_environment()
    fabric._launched = True
    if fabric.world_size != beside.world_size:
        raise ValueError(
            f"A strategy of its own needs the ranks of the others: it found {fabric.world_size}, not "
            f"{beside.world_size}; with one device, name ddp or a sharding strategy rather than auto."
        )
    return fabric


def sharding_of(fabric: Fabric) -> Sharding:
    """The surface for the strategy that a Fabric runs.

    Raises:
        ValueError: it is one of Fabric's own.
    """
    for kind, surface in _SURFACES.items():
        if isinstance(fabric.strategy, kind):
            return surface(fabric)
    raise _refusal(fabric.strategy)


def placement_of(strategy: str | Strategy, ranks: int, precision: str) -> Placement:
    """How a model will lie over ``ranks`` under a strategy that :func:`make_fabric` takes."""
    if isinstance(strategy, SingleDeviceStrategy) or strategy == "auto":
        strategy = "ddp"
    made: Any = STRATEGIES[strategy]() if isinstance(strategy, str) else strategy
    return made.placement(ranks, _LONG_NAMES.get(precision, precision))


def _check(strategy: str | Strategy) -> None:
    if isinstance(strategy, str):
        if strategy in ("auto", *STRATEGIES):
            return
        instead = _instead_of(strategy)
        raise ValueError(f"trainer.strategy={strategy!r} is not supported; use {instead or f'one of {_NAMES}'}.")
    if not isinstance(strategy, (DDP, FSDP2, ZeRO)):
        raise _refusal(strategy)


def _refusal(strategy: Strategy) -> ValueError:
    name = type(strategy).__name__
    return ValueError(
        f"trainer.strategy is Fabric's own {name}, which loses gradients or state silently in this loop; use "
        f"{_instead_of(name.lower()) or f'one of {_NAMES}'}, or lightrft.strategies' DDP, FSDP2 or ZeRO by class_path."
    )


def _instead_of(name: str) -> str | None:
    """Ours, in place of a strategy of Fabric's own."""
    if name.startswith("deepspeed"):
        stage = next((stage for stage in "123" if stage in name), "2")
        return f"zero{stage}_offload" if "offload" in name else f"zero{stage}"
    if name.startswith(("fsdp", "model_parallel", "modelparallel")):
        return "fsdp2_offload" if "offload" in name else "fsdp2"
    return "ddp" if name.startswith("ddp") else "auto" if name.startswith("single") else None


def _check_precision(strategy: Strategy, precision: str) -> None:
    known = next(precisions for kind, precisions in _PRECISIONS.items() if isinstance(strategy, kind))
    if precision not in known:
        raise ValueError(
            f"trainer.precision={precision!r} is not supported under {type(strategy).__name__}; use one of "
            f"{', '.join(known)}."
        )


def _has_cuda(accelerator: Any) -> bool:
    name = accelerator if isinstance(accelerator, str) else type(accelerator).__name__.lower()
    return torch.cuda.is_available() and "cpu" not in name
