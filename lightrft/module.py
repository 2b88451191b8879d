"""RFTModule: what the trainer needs of a model: policy, reference, algorithm, rewards, optimizer."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightrft.algorithms import Algorithm, resolve_algorithm
from lightrft.rewards import Scorer


class RFTModule(LightningModule):
    """Joins the actor, its frozen reference, the algorithm and the rewards.

    Args:
        actor: the policy, e.g. :class:`lightrft.lightning_modules.ActorModule`. The reference is its weights at the
            start: a frozen copy, or with LoRA the base with the adapter off.
        algorithm: a preset's name (``grpo``) or an :class:`~lightrft.algorithms.Algorithm`.
        rewards: recipes by label and what happens to a response that cannot be scored.

    Raises:
        ValueError: an unknown algorithm.
    """

    def __init__(self, actor: LightningModule, algorithm: str | Algorithm = "grpo", rewards: Scorer | None = None):
        super().__init__()
        self.actor: Any = actor
        self.algorithm = resolve_algorithm(algorithm)
        self.scorer = rewards if rewards is not None else Scorer()
        self.reference: Any = None

    def configure_model(self) -> None:
        """Load the weights, and copy them for the reference where the algorithm wants one. Idempotent."""
        self.actor.configure_model()
        if self.needs_reference_copy and self.reference is None:
            self.reference = self.actor.frozen_copy()

    @property
    def needs_reference_copy(self) -> bool:
        """Whether a second set of weights is held; LoRA needs none."""
        return self.algorithm.needs_reference and self.actor.lora is None

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and response together that the actor reads."""
        config = self.actor.transformer.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)

    @property
    def tokenizer(self) -> Any:
        """The actor's tokenizer."""
        return self.actor.tokenizer

    def check_labels(self, labels: Iterable[str | None], complete: bool = False) -> None:
        """Raise ``ValueError`` for a label without a reward recipe; if ``complete``, for a recipe of no label too."""
        self.scorer.check_labels(labels, complete)

    def check_group_size(self, samples_per_prompt: int) -> None:
        """Raise ``ValueError`` where nothing could be learned: in a group of one no response is better than another."""
        if samples_per_prompt == 1 and self.algorithm.needs_groups:
            raise ValueError(
                f"trainer.samples_per_prompt is 1, but the advantage {self.algorithm.advantage} compares responses to "
                "one prompt, so all would be 0; set at least 2."
            )

    def export_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights as an engine takes them."""
        return self.actor.export_parameters()

    def save_pretrained(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        self.actor.save_pretrained(folder)

    def configure_optimizers(self) -> Any:
        """The actor's own: an optimizer, or a dict with it and its schedule, as Lightning takes them."""
        return self.actor.configure_optimizers()


def optimizer_and_scheduler(configured: Any) -> tuple[torch.optim.Optimizer, Any]:
    """What ``configure_optimizers`` returned as ``(optimizer, scheduler or None)``.

    Raises:
        ValueError: another form than one optimizer, or a dict of it and a schedule that is stepped with it.
    """
    if isinstance(configured, torch.optim.Optimizer):
        return configured, None
    if isinstance(configured, dict) and isinstance(configured.get("optimizer"), torch.optim.Optimizer):
        schedule = configured.get("lr_scheduler")
        if isinstance(schedule, dict):
            _check_schedule(schedule)
            schedule = schedule["scheduler"]
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
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
