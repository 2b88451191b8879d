"""RFTModule: what the trainer needs of a model: policy, reference, algorithm, rewards, optimizer."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed import ProcessGroup

from lightrft.algorithms import Algorithm, resolve_algorithm
from lightrft.media import MediaProcessor
from lightrft.rewards import Scorer
from lightrft.samples import Prompt, Reading


class RFTModule(LightningModule):
    """Joins the actor, its frozen reference, the algorithm and the rewards.

    Args:
        actor: the policy, e.g. :class:`lightrft.lightning_modules.ActorModule`. The reference is its weights at the
            start: a frozen copy, or with LoRA the base with the adapter off.
        algorithm: a preset's name (``grpo``) or an :class:`~lightrft.algorithms.Algorithm`.
        rewards: recipes by label and what happens to a response that cannot be scored.
        critic: predicts returns, for the algorithms that need it (``ppo``), e.g.
            :class:`lightrft.lightning_modules.CriticModule`.

    Raises:
        ValueError: an unknown algorithm, one that needs a critic without it, or a critic that nothing would use.
    """

    def __init__(
        self,
        actor: LightningModule,
        algorithm: str | Algorithm = "grpo",
        rewards: Scorer | None = None,
        critic: LightningModule | None = None,
    ):
        super().__init__()
        self.actor: Any = actor
        self.algorithm = resolve_algorithm(algorithm)
        self.critic: Any = critic
        self._check_critic()
        self.scorer = rewards if rewards is not None else Scorer()
        self.reference: Any = None

    def configure_model(self) -> None:
        """Load the weights, and copy them for the reference where the algorithm wants one. Idempotent.

        Raises:
            ValueError: the critic cannot read what the actor writes.
        """
        self.actor.configure_model()
        if self.critic is not None:
            self.critic.configure_model()
            self._check_critic_vocabulary()
        if self.needs_reference_copy and self.reference is None:
            self.reference = self.actor.frozen_copy()

    def shard_sequences(self, group: ProcessGroup) -> None:
        """Let the ranks of ``group`` share the tokens of each micro-batch; called before models are placed.

        Raises:
            ValueError: a model's heads are no multiple of the group's size, or it pads.
        """
        for model in (self.actor, self.critic, self.reference):
            if model is not None:
                model.shard_sequences(group)

    def _check_critic(self) -> None:
        needed = self.algorithm.needs_values
        if needed and self.critic is None:
            raise ValueError(
                "The algorithm's advantage reads a critic's values; set model.critic, e.g. {class_path: CriticModule, "
                "init_args: {model: <the actor's>}}."
            )
        if not needed and self.critic is not None:
            raise ValueError("The algorithm has no use for model.critic; remove it, or take ppo (advantage: gae).")

    def _check_critic_vocabulary(self) -> None:
        known, needed = (model.transformer.get_input_embeddings().num_embeddings for model in (self.critic, self.actor))
        if known < needed:
            raise ValueError(
                f"The critic embeds {known} tokens, the actor can sample {needed}; give model.critic a model of the "
                "actor's family and vocabulary."
            )

    @property
    def needs_reference_copy(self) -> bool:
        """Whether a second set of weights is held; LoRA needs none."""
        return self.algorithm.needs_reference and self.actor.lora is None

    @property
    def warmup_iterations(self) -> int:
        """Iterations at the start in which only the critic trains."""
        return self.critic.warmup_iterations if self.critic is not None else 0

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and response together that the actor, and the critic, reads."""
        models = [self.actor, *([self.critic] if self.critic is not None else [])]
        configs = [model.transformer.config.get_text_config() for model in models]
        return min(int(getattr(config, "max_position_embeddings", None) or sys.maxsize) for config in configs)

    @property
    def tokenizer(self) -> Any:
        """The actor's tokenizer."""
        return self.actor.tokenizer

    @property
    def processor(self) -> Any:
        """The actor's tokenizer, or where it reads media the processor around it."""
        return self.actor.processor

    @property
    def media(self) -> MediaProcessor | None:
        """What reads images and audio for the actor and the critic; ``None`` where they read text alone."""
        return self.actor.media

    def read(self, prompts: Iterable[Prompt]) -> list[Reading]:
        """Prompts as the models take them.

        Raises:
            MediaError: media that cannot be used; names the prompt.
        """
        if self.media is None:
            return [Reading(prompt.token_ids) for prompt in prompts]
        return [self.media.read(prompt) for prompt in prompts]

    def check_labels(self, labels: Iterable[str | None], complete: bool = False) -> None:
        """Raise ``ValueError`` for a label without a reward recipe; if ``complete``, for a recipe of no label too."""
        self.scorer.check_labels(labels, complete)

    def check_group_size(self, samples_per_prompt: int) -> None:
        """Raise ``ValueError`` where nothing could be learned: in a group of one no response is better than another."""
        if samples_per_prompt == 1 and self.algorithm.needs_groups:
            raise ValueError(
                f"trainer.samples_per_prompt is 1, but the advantage {self.algorithm.axes.advantage} compares "
                "responses to one prompt, so all would be 0; set at least 2."
            )

    def check_warmup(self, max_iterations: int) -> None:
        """Raise ``ValueError`` where the critic alone would train until the end."""
        if self.warmup_iterations >= max_iterations:
            raise ValueError(
                f"The critic's warmup_iterations={self.warmup_iterations} leaves the policy none of "
                f"trainer.max_iterations={max_iterations} to train in; lower it, or raise max_iterations."
            )

    def export_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights as an engine takes them."""
        return self.actor.export_parameters()

    def save_pretrained(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder. On all ranks together; the first one writes."""
        self.actor.save_pretrained(folder)

    def save_settings(self, folder: Path) -> None:
        """Write what a Hugging Face folder of the policy holds besides weights."""
        self.actor.save_settings(folder)
