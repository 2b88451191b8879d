"""Validation: held-out prompts during training."""

from __future__ import annotations

from typing import Any

from lightrft.callback import RFTCallback
from lightrft.trainer import check_validation_sampling


class Validation(RFTCallback):
    """Samples and scores the validation prompts every few iterations and after the last; logs ``val/...``.

    Args:
        every_n_iterations: how often.
        at_start: also before the first iteration (logged as step 0).
        samples_per_prompt: responses to each prompt.
        temperature: of their sampling; 0 is greedy.

    Attributes:
        first, last: metrics of the first and the latest validation of the run, empty before.

    Raises:
        ValueError: several greedy samples, which would be equal, or a number out of range.
    """

    def __init__(
        self,
        every_n_iterations: int = 10,
        at_start: bool = True,
        samples_per_prompt: int = 1,
        temperature: float = 0.0,
    ) -> None:
        if every_n_iterations < 1:
            raise ValueError("Validation needs every_n_iterations of at least 1.")
        check_validation_sampling(samples_per_prompt, temperature)
        self.every_n_iterations = every_n_iterations
        self.at_start = at_start
        self.samples_per_prompt = samples_per_prompt
        self.temperature = temperature
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse before training where there is nothing to validate on.

        Raises:
            ValueError: the data module has no validation prompts.
        """
        trainer.validation_prompts()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.at_start and trainer.progress.iteration == 0 and trainer.progress.phase == "rollout":
            trainer.fabric.log_dict(self._validate(trainer), step=0)

    def on_iteration_end(self, trainer: Any, pl_module: Any) -> None:
        done = trainer.progress.iteration
        if done % self.every_n_iterations == 0 or done == trainer.max_iterations:
            for name, value in self._validate(trainer).items():
                trainer.log(name, value)

    def _validate(self, trainer: Any) -> dict[str, float]:
        self.last = trainer.evaluate(self.samples_per_prompt, self.temperature)
        self.first = self.first or self.last
        return self.last

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first, self.last = dict(state_dict["first"]), dict(state_dict["last"])
