"""The critic: a causal language model's layers under a head that says what a state is worth."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lightrft.lightning_modules.backbone import LanguageBackbone
from lightrft.lightning_modules.pretrained import LoRA


class CriticModule(LanguageBackbone):
    """The value function of PPO (arXiv 1707.06347): the return that is still to come after each token.

    The constructor is cheap; weights load in :meth:`configure_model`: a causal language model without its head, under
    a linear value head that starts at 0.

    Args:
        model: name or folder of weights. Give this or ``config``.
        config: a model configuration (``model_type`` and what ``transformers.AutoConfig.for_model`` takes) for fresh
            weights.
        packing: feed packed rows (no padding computed). ``false`` pads: for architectures whose layers see across
            a packed row (state space, attention sinks, soft caps).
        gradient_checkpointing: keep no activations inside a block, compute them again in the backward.
        freeze: weights that stay as they are, by patterns of their names (``model.visual.*``); with ``lora``, layers
            without adapters.
        lora: train low-rank adapters, and the head, instead of the weights.
        optimizer: builds the optimizer from the parameters. The default's learning rate is 10 times the actor's, close
            to InstructGPT's 9e-6 (arXiv 2203.02155, appendix C).
        lr_scheduler: builds a schedule from the optimizer, stepped after each optimizer step; ``None`` is constant.
        value_clip: how far a value may move from the rollout's, in units of reward, before the value loss takes the
            error of the clipped value where that is larger (arXiv 2005.12729); 0 does not clip.
        warmup_iterations: iterations at the start in which the critic alone trains.

    Attributes:
        head: maps hidden states to values; ``None`` until the weights are loaded.

    Raises:
        ValueError: none or both of ``model`` and ``config``; a negative ``value_clip`` or ``warmup_iterations``.
    """

    role: ClassVar[str] = "critic"

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        packing: bool = True,
        gradient_checkpointing: bool = False,
        freeze: list[str] | None = None,
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        value_clip: float = 0.2,
        warmup_iterations: int = 0,
    ) -> None:
        super().__init__(model, config, packing, gradient_checkpointing, freeze, lora, optimizer, lr_scheduler)
        if not value_clip >= 0:
            raise ValueError(f"The critic's value_clip is {value_clip}; give a distance above 0, or 0 not to clip.")
        if warmup_iterations < 0:
            raise ValueError(f"The critic's warmup_iterations is {warmup_iterations}; give 0 or more.")
        self.value_clip = value_clip
        self.warmup_iterations = warmup_iterations
        self.head: ValueHead | None = None

    def _accept(self, model: PreTrainedModel) -> PreTrainedModel:
        """The layers alone; the language model's head and its memory go."""
        replaced = model.get_output_embeddings().weight
        self.head = ValueHead(replaced.shape[1], 1, device=replaced.device, dtype=replaced.dtype)
        return model.base_model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        predict: Tensor,
        media: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Values of the states at the ``predict`` positions: each before the next token, which it does not see.

        Args:
            input_ids: int64 ``[N]``, packed (:class:`lightrft.ops.Packed`).
            position_ids: int64 ``[N]``.
            cu_seqlens: int32 ``[S + 1]``.
            predict: int64 ``[M]``.
            media: what the model takes beside the tokens.

        Returns:
            at least float32 ``[M]``, in units of reward.
        """

        def values_of(hidden: Tensor, positions: Tensor) -> tuple[Tensor]:
            assert self.head is not None, "loaded with the weights"
            return (self.head(hidden)[:, 0],)

        (values,) = self._at_predictions(input_ids, position_ids, cu_seqlens, predict, media or {}, values_of)
        return values


class ValueHead(nn.Linear):
    """A linear map that starts at 0 and works in at least float32, whatever the precision around it.

    At 0, the first advantages are what the rewards say; a random head's values would be noise that the actor follows
    before the critic has learned (Ziegler et al. 2019, arXiv 1909.08593, whose code starts it at 0 too).
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        # bfloat16 has steps of 0.008 above 1, and advantages are differences of values.
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
