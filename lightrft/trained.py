"""Models as a strategy placed them: one in training, with its optimizer and its schedule, and a frozen one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightrft.strategies import Movable, Sharding
from lightrft.strategies.state import State


class Trained:
    """Actor or critic, ready to be called and stepped.

    Args:
        sharding: places it.
        module: configured; its ``configure_optimizers`` says how it is trained.
        gradient_clip_val: largest norm of its whole gradient; ``None`` does not clip.

    Attributes:
        origin: the module as it was given.
        module: what to call.
        settings: optimizer and schedule as configured, which a checkpoint's state would replace unseen.
        weights, optimizer_state: what can lie in host memory for a time; each comes back where it is used.
    """

    def __init__(self, sharding: Sharding, module: LightningModule, gradient_clip_val: float | None) -> None:
        self.sharding, self.origin, self.gradient_clip_val = sharding, module, gradient_clip_val
        optimizer, self.scheduler = optimizer_and_scheduler(module.configure_optimizers())
        self.settings = _settings(optimizer, self.scheduler)
        self.module, self.optimizer = sharding.setup(module, optimizer)
        device = sharding.fabric.device
        self.weights = Movable(lambda: sharding.held_weights(module), device)
        self.optimizer_state = Movable(lambda: sharding.held_optimizer_state(self.module, self.optimizer), device)
        self.module.register_forward_pre_hook(lambda *_: self.weights.here())

    def step(self) -> dict[str, float]:
        """One optimizer step with the gradients that were accumulated, skipped where their norm is not finite.

        Returns:
            ``gradient_norm`` before clipping, ``skipped_updates`` (0 or 1) and the ``learning_rate`` of the step.
        """
        self.optimizer_state.here()
        norm = self.sharding.step(self.module, self.optimizer, self.gradient_clip_val)
        skipped = not math.isfinite(norm)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if self.scheduler is not None and not skipped:
            self.scheduler.step()
        return {"gradient_norm": norm, "skipped_updates": float(skipped), "learning_rate": learning_rate}

    def snapshot(self) -> State:
        """This rank's part of weights and optimizer state, in host memory. Collective."""
        self._all_here()
        return self.sharding.snapshot(self.module, self.optimizer)

    @property
    def checkpoint_bytes(self) -> int:
        """What the parts of all ranks take, about."""
        return self.sharding.state_bytes(self.origin)

    def load(self, folder: Path, weights_only: bool) -> None:
        """Read them back. Collective.

        Raises:
            ValueError: the weights or the optimizer's parameters are others.
        """
        self._all_here()
        self.sharding.load(folder, self.module, None if weights_only else self.optimizer)

    def _all_here(self) -> None:
        self.weights.here()
        self.optimizer_state.here()


class Frozen:
    """A model that is only evaluated.

    Args:
        sharding: places it.
        module: configured.

    Attributes:
        weights: can lie in host memory for a time; they come back when the model is called.
    """

    def __init__(self, sharding: Sharding, module: LightningModule) -> None:
        self._evaluate = sharding.setup_frozen(module)
        self.weights = Movable(lambda: sharding.held_weights(module), sharding.fabric.device, constant=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.weights.here()
        return self._evaluate(*args, **kwargs)


def optimizer_and_scheduler(configured: Any) -> tuple[Optimizer, Any]:
    """What ``configure_optimizers`` returned as ``(optimizer, scheduler or None)``.

    Raises:
        ValueError: another form than one optimizer, or a dict of it and a schedule that is stepped with it.
    """
    if isinstance(configured, Optimizer):
        return configured, None
    if isinstance(configured, dict) and isinstance(configured.get("optimizer"), Optimizer):
        schedule = configured.get("lr_scheduler")
        if isinstance(schedule, dict):
            _check_schedule(schedule)
            schedule = schedule["scheduler"]
        if isinstance(schedule, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau waits for a metric; choose a schedule of the optimizer's steps.")
        return configured["optimizer"], schedule
    raise ValueError(
        "configure_optimizers() must return an optimizer, or a dict with 'optimizer' and optionally 'lr_scheduler'; "
        f"got {type(configured).__name__}."
    )


def _check_schedule(schedule: dict[str, Any]) -> None:
    wanted = {"interval": "step", "frequency": 1}
    for key, value in wanted.items():
        if schedule.get(key, value) != value:
            raise ValueError(
                f"lr_scheduler has {key}={schedule[key]!r}, but RFTTrainer steps it after each optimizer step; "
                f"set {key}={value!r}."
            )


def _settings(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """Names and plain values of a new optimizer and its schedule."""
    named: dict[str, Any] = {"optimizer": type(optimizer).__name__, "lr_scheduler": None}
    for index, group in enumerate(optimizer.param_groups):
        named |= {f"optimizer.{name}" + (f"[{index}]" if index else ""): value for name, value in group.items()}
    if scheduler is not None:
        named["lr_scheduler"] = type(scheduler).__name__
        named |= {f"lr_scheduler.{name}": value for name, value in scheduler.state_dict().items() if name[0] != "_"}
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in named.items()
        if all(isinstance(one, plain) for one in (value if isinstance(value, (list, tuple)) else [value]))
    }
