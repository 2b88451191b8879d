"""OffloadDuringRollout: what the trainer does not need while the engine samples lies in host memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

from lightrft.callback import RFTCallback
from lightrft.strategies import Movable, to_host

Part = Literal["optimizer", "reference", "critic"]


class OffloadDuringRollout(RFTCallback):
    """Moves parts of the trainer to host memory before the engine wakes, in training and validation.

    They come back while other work goes on: reference and critic while responses are scored, optimizer states while
    the first forward and backward of an update run. A checkpoint finds them on the device.

    Args:
        parts: ``optimizer`` is the optimizer states of actor and critic (under ZeRO the master weights too),
            ``reference`` and ``critic`` are weights.

    Raises:
        ValueError: no parts, an unknown one, one twice; or one that the run has not (when it starts).
    """

    def __init__(self, parts: list[Part]) -> None:
        if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(get_args(Part)):
            raise ValueError(f"parts is {parts}; list some of {', '.join(get_args(Part))}, each once.")
        self.parts = parts

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        learner = trainer.learner
        if "reference" in self.parts and learner.reference is None:
            raise ValueError(
                "OffloadDuringRollout has the part reference, but the run holds none: the algorithm has no use for "
                "one, or LoRA's base is it; remove the part."
            )
        if "critic" in self.parts and learner.critic is None:
            raise ValueError("OffloadDuringRollout has the part critic, but the run has none; remove the part.")

    def on_rollout_start(self, trainer: Any, pl_module: Any, prompts: Sequence[Any]) -> None:
        self._leave(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._leave(trainer)

    def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        if not pl_module.algorithm.refill_rounds:  # else the engine may sample again
            self._fetch(trainer, "reference", "critic")

    def on_score_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        self._fetch(trainer, "reference", "critic")

    def on_update_start(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        self._fetch(trainer, "optimizer")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the models whole."""
        if hasattr(trainer, "learner"):
            for movable in self._movables(trainer.learner, *self.parts):
                movable.here()

    def _leave(self, trainer: Any) -> None:
        start = time.perf_counter()
        to_host(self._movables(trainer.learner, *self.parts))
        trainer.log("time/offload_seconds", time.perf_counter() - start)

    def _fetch(self, trainer: Any, *parts: Part) -> None:
        for movable in self._movables(trainer.learner, *(part for part in parts if part in self.parts)):
            movable.fetch()

    def _movables(self, learner: Any, *parts: Part) -> list[Movable]:
        found: dict[Part, list[Movable]] = {"optimizer": [one.optimizer_state for one in learner.trained.values()]}
        found["reference"] = [learner.reference.weights] if learner.reference else []
        found["critic"] = [learner.critic.weights] if learner.critic else []
        return [movable for part in parts for movable in found[part]]
