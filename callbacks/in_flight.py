"""InFlight: a rollout with more prompts under way than an iteration trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightrft import samples
from lightrft.analysis import Metrics
from lightrft.callbacks.rollout import Rollout
from lightrft.engines.seeds import response_seed
from lightrft.samples import Prompt, Response, Sampling

Item = TypeVar("Item")


@dataclass(eq=False)
class Group:
    """A prompt under way.

    Attributes:
        number: of its draw, over all ranks: the order in which groups began.
        prompt: what is asked.
        seeds: of each response.
        responses: none before the first token.
    """

    number: int
    prompt: Prompt
    seeds: list[int]
    responses: list[Response] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "prompt": self.prompt.state_dict(),
            "seeds": self.seeds,
            "responses": [response.state_dict() for response in self.responses],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Group:
        responses = [Response(**response) for response in state["responses"]]
        return cls(**{**state, "prompt": Prompt.from_state_dict(state["prompt"]), "responses": responses})


class InFlight(Rollout):
    """Base of rollouts that hold a pool of groups beyond those that an iteration trains on.

    The first iteration draws ``groups_in_flight`` more prompts than the others. Between two calls of :meth:`sample`
    every rank holds as many groups as every other.

    Attributes:
        groups_in_flight: held between iterations, over all ranks.
        pool: this rank's, in the order in which they began.
    """

    groups_in_flight: int

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start the engine.

        Raises:
            ValueError: the ranks cannot share the groups in flight equally.
        """
        self.pool: list[Group] = []
        self._drawn = 0
        self._share = trainer.prompts_per_update
        self._rank, self._ranks = trainer.fabric.global_rank, trainer.fabric.world_size
        if self.groups_in_flight % self._ranks:
            raise ValueError(
                f"groups_in_flight={self.groups_in_flight} cannot be shared by {self._ranks} ranks; make it a "
                "multiple of them."
            )
        if stage == "fit" and pl_module.algorithm.axes.correction == "none":
            rank_zero_warn(
                f"{type(self).__name__} trains on responses of earlier weights, and the algorithm takes them for the "
                "current ones': set its correction, for example to token_tis."
            )
        super().setup(trainer, pl_module, stage)

    def prompts_to_draw(self, prompts: int) -> int:
        return prompts + self.groups_in_flight - len(self.pool) * self._ranks

    def on_score_end(self, trainer: Any, pl_module: Any, rollout: samples.Rollout) -> None:
        """How many weight versions behind the current one the tokens are that are to be trained on."""
        metrics = Metrics()
        behind = trainer.progress.weight_version - torch.cat([response.versions for _, response in rollout])
        metrics.mean("rollout/staleness_mean", behind)
        metrics.maximum("rollout/staleness_max", behind)
        for name, value in metrics.compute().items():
            trainer.log(name, value)

    def _enter(self, prompts: Sequence[Prompt], samples_per_prompt: int, run_seed: int, iteration: int) -> None:
        """Take prompts into the pool; their seeds are those of the iteration in which they enter."""
        end = self._drawn + len(prompts) * self._ranks
        numbers = self._dealt(range(self._drawn, end), self._rank)
        self._drawn = end
        for number, prompt in zip(numbers, prompts, strict=True):
            seeds = [response_seed(run_seed, iteration, prompt.uid, index) for index in range(samples_per_prompt)]
            self.pool.append(Group(number, prompt, seeds))

    def _dealt(self, items: Sequence[Item], rank: int) -> list[Item]:
        """A rank's part of what all ranks have, dealt as the trainer draws: of every update's share one block."""
        mine: list[Item] = []
        for start in range(0, len(items), self._share):
            share = items[start : start + self._share]
            size = len(share) // self._ranks
            mine += share[rank * size : (rank + 1) * size]
        return mine

    def _rollout(self, groups: Sequence[Group]) -> samples.Rollout:
        return samples.Rollout([one.prompt for one in groups], [one.responses for one in groups], self.sampling)

    def state_dict(self) -> dict[str, Any]:
        return {
            "groups_in_flight": self.groups_in_flight,
            "sampling": self.sampling.state_dict(),
            "drawn": self._drawn,
            "groups": [group.state_dict() for group in self.pool],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the groups in flight.

        Raises:
            ValueError: they are more or fewer than this run's, or were sampled otherwise.
        """
        then = {
            "groups_in_flight": state_dict["groups_in_flight"],
            "sampling": Sampling.from_state_dict(state_dict["sampling"]),
        }
        for name, was in then.items():
            if (now := getattr(self, name)) != was:
                raise ValueError(
                    f"The checkpoint holds groups in flight, sampled with {name}={was}; this run has {now}, set it "
                    "back."
                )
        self._drawn = state_dict["drawn"]
        self.pool = [Group.from_state_dict(group) for group in state_dict["groups"]]

    def reshard(self, states: list[dict[str, Any]], rank: int, ranks: int) -> dict[str, Any]:
        """The pool is one over all ranks, and is dealt out anew."""
        everyone = sorted((group for state in states for group in state["groups"]), key=lambda group: group["number"])
        return states[0] | {"groups": self._dealt(everyone, rank)}
