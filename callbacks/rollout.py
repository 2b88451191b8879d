"""Rollout: prompts to responses through an engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from lightrft import samples
from lightrft.callback import RolloutCallback
from lightrft.callbacks.weight_sync import StaleWeightsError
from lightrft.engines import Engine, EngineGroup
from lightrft.engines.seeds import response_seed
from lightrft.samples import Prompt, Sampling


class Rollout(RolloutCallback):
    """Owns the engine: starts it, samples with it, closes it.

    Where an engine lies over several ranks, each of them samples what all of them ask for and keeps the answers to its
    own prompts, of which it may have none.

    Args:
        engine: samples the responses.
        sampling: how training responses are drawn; ``None`` is temperature 1 without truncation, 1024 tokens.

    Raises:
        ValueError: greedy training sampling, whose responses to a prompt would all be one.
    """

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        self.engine = engine
        self.sampling = sampling or Sampling()
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0 (greedy): a group's responses would be equal; set it above 0.")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        config = copy.deepcopy(pl_module.actor.transformer.config)
        # What the trainer computes in, and what ends a response, where only the folder's generation config says so.
        config.dtype = trainer.compute_dtype
        config.eos_token_id = _stop_ids(config, pl_module.actor.transformer.generation_config)
        self._group = EngineGroup(self.engine.tensor_parallel_size)
        self.engine.start(config, pl_module.processor, trainer.fabric.device, self._group)

    def on_engine_ready(self, trainer: Any, pl_module: Any) -> None:
        """Refuse to sample with weights that are not the trainer's current ones."""
        if self.engine.weight_version != trainer.progress.weight_version:
            raise StaleWeightsError(
                f"The engine holds weight version {self.engine.weight_version}, the trainer is at "
                f"{trainer.progress.weight_version}; list lightrft.callbacks.WeightSync in trainer.callbacks."
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        run_seed: int,
        iteration: int,
        sampling: Sampling | None = None,
    ) -> samples.Rollout:
        sampling = sampling or self.sampling
        seeds = [
            [response_seed(run_seed, iteration, prompt.uid, index) for index in range(samples_per_prompt)]
            for prompt in prompts
        ]
        asked, all_seeds, own = self._group.join(prompts, seeds)
        groups = self.engine.generate(asked, sampling, all_seeds)
        return samples.Rollout(list(prompts), groups[own], sampling)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.engine.close()


def _stop_ids(*configs: Any) -> list[int] | None:
    """Every end of sequence that any of the configurations names."""
    found: set[int] = set()
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return sorted(found) or None
