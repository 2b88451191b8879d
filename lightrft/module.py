"""RFTModule: what the trainer needs of a model: policy, reference, algorithm, rewards, optimizer."""

from __future__ import annotations

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
    def tokenizer(self) -> Any:
        """The actor's tokenizer."""
        return self.actor.tokenizer

    def check_labels(self, labels: Iterable[str | None]) -> None:
        """Raise ``ValueError`` for a label without a reward recipe."""
        self.scorer.check_labels(labels)

    def export_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights as an engine takes them."""
        return self.actor.export_parameters()

    def save_pretrained(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        self.actor.save_pretrained(folder)

    def configure_optimizers(self) -> Any:
        """The actor's own: an optimizer, or a dict with it and its schedule, as Lightning takes them."""
        return self.actor.configure_optimizers()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The actor's weights; the reference is loaded from where it started."""
        return self.actor.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.actor.load_state_dict(state_dict, strict=strict, assign=assign)


def optimizer_and_scheduler(configured: Any) -> tuple[torch.optim.Optimizer, Any]:
    """What ``configure_optimizers`` returned as ``(optimizer, scheduler or None)``.

    Raises:
        ValueError: another form than one optimizer, or a dict of it and a schedule.
    """
    if isinstance(configured, torch.optim.Optimizer):
        return configured, None
    if isinstance(configured, dict) and isinstance(configured.get("optimizer"), torch.optim.Optimizer):
        schedule = configured.get("lr_scheduler")
        return configured["optimizer"], schedule["scheduler"] if isinstance(schedule, dict) else schedule
    raise ValueError(
        "configure_optimizers() must return an optimizer, or a dict with 'optimizer' and optionally 'lr_scheduler'; "
        f"got {type(configured).__name__}."
    )
