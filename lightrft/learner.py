"""The learning half of an iteration: log-probs and advantages of a scored rollout, and optimizer steps over it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer

from lightrft.algorithms import StepTotals
from lightrft.module import RFTModule, optimizer_and_scheduler
from lightrft.ops import pack, split_by_tokens
from lightrft.samples import Batch
from lightrft.strategies import sharding_of


class Learner:
    """Actor, optimizer and reference as the strategy placed them.

    Args:
        fabric: launched.
        module: configured.
        tokens_per_microbatch: most tokens that one forward holds.
        gradient_clip_val: largest norm of the whole gradient; ``None`` does not clip.

    Attributes:
        settings: optimizer and schedule as configured, which a checkpoint's state would replace unseen.
    """

    def __init__(
        self, fabric: Fabric, module: RFTModule, tokens_per_microbatch: int, gradient_clip_val: float | None
    ) -> None:
        self.fabric = fabric
        self.module = module
        self.tokens_per_microbatch = tokens_per_microbatch
        self.gradient_clip_val = gradient_clip_val
        self.sharding = sharding_of(fabric)
        optimizer, self.scheduler = optimizer_and_scheduler(module.configure_optimizers())
        self.settings = _settings(optimizer, self.scheduler)
        self.actor, self.optimizer = self.sharding.setup(module.actor, optimizer)
        self.reference = self.sharding.setup_frozen(module.reference) if module.reference is not None else None

    def prepare(self, batch: Batch, temperature: float) -> None:
        """Fill in ``log_probs_old``, ``log_probs_reference`` and ``advantages``, on the host."""
        self.actor.eval()
        batch.log_probs_old = self._log_probs(batch, self.actor, temperature)
        if self.module.algorithm.needs_reference:
            batch.log_probs_reference = self._log_probs(batch, self._reference, temperature)
        batch.advantages = self.module.algorithm.advantages(batch)

    def _reference(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.reference is not None:
            return self.reference(*args, **kwargs)
        return self.actor(*args, **kwargs, adapter=False)

    @torch.no_grad()
    def _log_probs(self, batch: Batch, model: Callable[..., tuple[Tensor, Tensor]], temperature: float) -> Tensor:
        log_probs = torch.zeros_like(batch.log_probs_rollout)
        for rows in self._micro_batches(batch):
            values, _ = self._forward(self._select(batch, rows), model, temperature)
            log_probs[rows] = values[: len(rows)].to(log_probs)
        return log_probs

    def _forward(
        self, batch: Batch, model: Callable[..., tuple[Tensor, Tensor]], temperature: float
    ) -> tuple[Tensor, Tensor]:
        """``(log_probs, entropy)``, each ``[B, T]``, 0 outside the mask."""
        packed = pack(batch.sequences, batch.prompt_lengths, batch.response_mask)
        log_probs, entropy = model(
            packed.input_ids, packed.position_ids, packed.cu_seqlens, packed.predict, temperature=temperature
        )
        return packed.scatter(log_probs), packed.scatter(entropy)

    def _micro_batches(self, batch: Batch) -> list[list[int]]:
        """Rows of each micro-batch; ranks with fewer get empty ones, so that collectives inside a forward keep step."""
        trained = torch.nonzero(batch.response_mask.any(-1)).flatten().tolist()
        lengths = [len(batch.sequences[row]) for row in trained]
        parts = [[trained[i] for i in part] for part in split_by_tokens(lengths, self.tokens_per_microbatch)]
        most = int(self.sharding.over_ranks(torch.tensor(float(max(len(parts), 1))), "max"))
        return parts + [[] for _ in range(most - len(parts))]

    def _select(self, batch: Batch, rows: list[int]) -> Batch:
        """The micro-batch on the device; an empty one is a sequence without a trained token."""
        part = batch.select(rows or [0])
        if not rows:
            part.response_mask = torch.zeros_like(part.response_mask)
        return part.to(self.fabric.device)

    def update(self, batch: Batch, temperature: float, max_response_tokens: int) -> dict[str, float]:
        """One optimizer step over ``batch`` (this rank's share), skipped on all ranks where its gradient is not finite.

        Returns:
            the step's metrics over all ranks.
        """
        self.actor.train()
        totals = self._totals(batch, max_response_tokens)
        parts = self._micro_batches(batch)
        sums: dict[str, Tensor] = {}
        for number, rows in enumerate(parts):
            part = self._select(batch, rows)
            with self.sharding.accumulate(self.actor, last=number == len(parts) - 1):
                log_probs, entropy = self._forward(part, self.actor, temperature)
                loss, metrics = self.module.algorithm.loss(log_probs, entropy, part, totals)
                # Strategies average gradients over ranks; the algorithm's weights ask for the sum.
                self.fabric.backward(loss * self.fabric.world_size)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        norm = self.sharding.step(self.actor, self.optimizer, self.gradient_clip_val)
        skipped = not math.isfinite(norm)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if self.scheduler is not None and not skipped:
            self.scheduler.step()
        return {
            **self._summed_over_ranks(sums),
            "gradient_norm": norm,
            "skipped_updates": float(skipped),
            "learning_rate": learning_rate,
            "responses": float(totals.responses),
            "tokens": float(totals.tokens),
        }

    def _totals(self, batch: Batch, max_response_tokens: int) -> StepTotals:
        mask = batch.response_mask
        counts = torch.tensor([float(mask.sum()), float(mask.any(-1).sum())], dtype=torch.float64)
        counts = self.sharding.over_ranks(counts, "sum")
        return StepTotals(int(counts[0]), int(counts[1]), max_response_tokens)

    def _summed_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        stacked = self.sharding.over_ranks(torch.stack(list(sums.values())), "sum")
        return dict(zip(sums, stacked.tolist()))


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
