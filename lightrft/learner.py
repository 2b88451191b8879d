"""The learning half of an iteration: log-probs and advantages of a scored rollout, and optimizer steps over it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightrft.algorithms import StepTotals
from lightrft.module import RFTModule
from lightrft.ops import pack
from lightrft.samples import Batch
from lightrft.sequence_cost import SequenceCost
from lightrft.strategies import Layout, Roles
from lightrft.trained import Frozen, Trained
from lightrft.whereabouts import mark
from lightrft.workload import Workload

_Loss = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]


class Learner:
    """Actor, critic and reference as the strategy placed them.

    Args:
        fabric: launched.
        roles: strategies of the models.
        module: configured.
        tokens_per_microbatch: most tokens that one forward holds on one rank.
        gradient_clip_val: largest norm of a model's whole gradient; ``None`` does not clip.
        sequence_parallel_size: ranks that share the tokens of a micro-batch.

    Attributes:
        cost: what a sequence costs the actor.
        policy: the actor in training.
        critic: the critic in training; ``None`` where the algorithm has none.
        reference: the frozen reference; ``None`` where the algorithm has none, or LoRA's base is it.
    """

    def __init__(
        self,
        fabric: Fabric,
        roles: Roles,
        module: RFTModule,
        tokens_per_microbatch: int,
        gradient_clip_val: float | None,
        sequence_parallel_size: int = 1,
    ) -> None:
        self.fabric = fabric
        self.layout = Layout(fabric.world_size, fabric.global_rank, sequence_parallel_size)
        self.module = module
        self.tokens_per_microbatch = tokens_per_microbatch
        self.sharding = roles.default
        self.cost = SequenceCost.of(module.actor.transformer)  # while its layers are whole, and called what they are
        if sequence_parallel_size > 1:
            module.shard_sequences(self.layout.mesh(fabric.device.type).get_group("sequence"))
        self.policy = Trained(roles["actor"], module.actor, gradient_clip_val)
        critic, reference = module.critic, module.reference
        self.critic = Trained(roles["critic"], critic, gradient_clip_val) if critic is not None else None
        self.reference = Frozen(roles["reference"], reference) if reference is not None else None

    @property
    def actor(self) -> Any:
        """The policy as the strategy placed it."""
        return self.policy.module

    @property
    def trained(self) -> dict[str, Trained]:
        """Every model in training, by the folder of its checkpoint."""
        return {".": self.policy} | ({"critic": self.critic} if self.critic else {})

    @property
    def settings(self) -> dict[str, Any]:
        """Optimizers and schedules as configured."""
        prefixes = {folder: "" if folder == "." else f"{folder}." for folder in self.trained}
        return {prefixes[f] + name: v for f, one in self.trained.items() for name, v in one.settings.items()}

    # --- before the updates ------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch, temperature: float, longest: int, rows_per_update: int) -> dict[str, float]:
        """Fill an iteration's batch, on the host: log-probs, values, and for each optimizer step its advantages.

        Args:
            batch: this rank's responses, one update's share after another.
            temperature: of the sampling.
            longest: most tokens a response may have.
            rows_per_update: responses of an optimizer step on this rank.

        Returns:
            metrics over all ranks, means over the optimizer steps.
        """
        algorithm, gather = self.module.algorithm, self.sharding.gather
        rewards = batch.rewards
        algorithm.shape_rewards(batch, longest, gather)
        algorithm.filter_groups(batch, rewards)
        work = self._workload(batch)
        self.actor.eval()
        batch.log_probs_old, batch.entropy_old = self._evaluate(work, partial(self.actor, temperature=temperature))
        if algorithm.needs_reference:
            batch.log_probs_reference, _ = self._evaluate(work, partial(self._reference, temperature=temperature))
        if self.critic:
            self.critic.module.eval()
            (batch.values_old,) = self._evaluate(work, self._values)
        shares = [range(start, start + rows_per_update) for start in range(0, len(batch), rows_per_update)]
        metrics: dict[str, float] = {}
        for rows in shares:
            part = batch.select(rows)
            for name, value in algorithm.prepare(part, gather).items():
                metrics[name] = metrics.get(name, 0.0) + value / len(shares)
            batch.put(rows, part)
        return metrics

    def _reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.reference is not None:
            return self.reference(*args, **kwargs)
        return self.actor(*args, **kwargs, adapter=False)

    def _values(self, *args: Any) -> tuple[Tensor]:
        assert self.critic is not None
        return (self.critic.module(*args),)

    @torch.no_grad()
    def _evaluate(self, work: Workload, model: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        """What ``model`` says of every trained token of this rank's rows, each float32 ``[B, T]`` on the host."""
        mark("log-probs and values of the batch")
        parts = (part.to(self.fabric.device) for part in work.micro_batches)
        return work.collect([[values.cpu() for values in self._forward(part, model)] for part in parts])

    def _forward(self, batch: Batch, model: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        """What ``model`` says of every trained token, each ``[B, T]``, 0 outside the mask."""
        mark()
        packed = pack(batch.sequences, batch.prompt_lengths, batch.response_mask, batch.readings)
        found = model(*packed.inputs)
        return [packed.scatter(values) for values in found]

    def _workload(self, batch: Batch) -> Workload:
        return Workload(
            batch,
            self.cost,
            self.tokens_per_microbatch,
            self.layout,
            self.sharding,
            self.module.media,
        )

    # --- an update ---------------------------------------------------------------------------------------------------

    def update(
        self, batch: Batch, temperature: float, max_response_tokens: int, train_policy: bool = True
    ) -> dict[str, float]:
        """One optimizer step of actor and critic over ``batch`` (this rank's share).

        A model's step is skipped, on all ranks, where its gradient is not finite; both are where nothing is trained on.

        Returns:
            the step's metrics over all ranks.
        """
        totals = self._totals(batch, max_response_tokens)
        outputs = {"responses": float(totals.responses), "tokens": float(totals.tokens), "skipped_updates": 0.0}
        if not totals.tokens:
            return outputs | {"skipped_updates": 1.0}
        work = self._workload(batch)
        outputs["balance/busiest_over_mean"] = work.busiest_over_mean
        if train_policy:
            outputs |= self._train(self.policy, work, partial(self._policy_loss, temperature, totals))
        if self.critic:
            learned = self._train(self.critic, work, partial(self._value_loss, totals))
            outputs |= {name if "/" in name else f"value/{name}": value for name, value in learned.items()}
        return outputs

    def _train(self, trained: Trained, work: Workload, loss_of: _Loss) -> dict[str, float]:
        trained.module.train()
        name = "actor" if trained is self.policy else "critic"
        metrics: dict[str, Tensor] = {}
        for number, part in enumerate(work.micro_batches, start=1):
            mark(f"forward and backward of the {name}, micro-batch {number} of {len(work.micro_batches)}")
            with trained.sharding.accumulate(trained.module, last=number == len(work.micro_batches)):
                loss, found = loss_of(part.to(self.fabric.device))
                # Strategies average gradients over ranks; the algorithm's weights ask for the sum.
                trained.sharding.backward(trained.module, loss * self.fabric.world_size)
            for name, value in found.items():
                metrics[name] = _joined(name, metrics.get(name), value.double())
        mark(f"metrics and step of the {name}")
        return self._over_ranks(metrics) | trained.step()

    def _policy_loss(self, temperature: float, totals: StepTotals, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, entropy = self._forward(part, partial(self.actor, temperature=temperature))
        return self.module.algorithm.loss(log_probs, entropy, part, totals)

    def _value_loss(self, totals: StepTotals, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (values,) = self._forward(part, self._values)
        return self.module.algorithm.value_loss(values, part, totals, self.module.critic.value_clip)

    def _totals(self, batch: Batch, max_response_tokens: int) -> StepTotals:
        mask = batch.response_mask
        counts = torch.tensor([float(mask.sum()), float(mask.any(-1).sum())], dtype=torch.float64)
        counts = self.sharding.over_ranks(counts, "sum")
        return StepTotals(int(counts[0]), int(counts[1]), max_response_tokens)

    def _over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """The sum over ranks of each, of those whose name ends in ``max`` the largest."""
        found: dict[str, float] = {}
        for largest in (False, True):
            names = [name for name in metrics if name.endswith("max") == largest]
            if names:
                values = torch.stack([metrics[name] for name in names])
                if not self.layout.leads and not largest:  # the ranks of a group computed the same
                    values = torch.zeros_like(values)
                values = self.sharding.over_ranks(values, "max" if largest else "sum")
                found |= dict(zip(names, values.tolist()))
        return found


def _joined(name: str, before: Tensor | None, value: Tensor) -> Tensor:
    """A metric of two parts of a step."""
    if before is None:
        return value
    return torch.maximum(before, value) if name.endswith("max") else before + value
