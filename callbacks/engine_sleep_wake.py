"""EngineSleepWake: the engine gives its memory to the trainer while it is not sampling."""

from __future__ import annotations

from typing import Any, Literal

from lightrft.callback import RFTCallback
from lightrft.engines.base import WakePart


class EngineSleepWake(RFTCallback):
    """Puts the engine to sleep after sampling; wakes its weights, and once they are current, its cache.

    Args:
        level: 1 keeps the engine's weights in host memory. 2 drops them; the next ``WeightSync`` pushes them again.

    Raises:
        ValueError: another level.
    """

    def __init__(self, level: Literal[1, 2] = 1) -> None:
        if level not in (1, 2):
            raise ValueError(f"level is {level!r}; it must be 1 (weights to host memory) or 2 (weights dropped).")
        self.level = level

    def on_engine_wake(self, trainer: Any, pl_module: Any, part: WakePart) -> None:
        trainer.rollout.engine.wake((part,))

    def on_engine_sleep(self, trainer: Any, pl_module: Any) -> None:
        trainer.rollout.engine.sleep(self.level)
