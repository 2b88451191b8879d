"""The actor: a causal language model that trains supervised under Lightning's Trainer and is the policy in RL."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightrft.data.supervised_set import SupervisedBatch
from lightrft.lightning_modules import pretrained
from lightrft.lightning_modules.backbone import LanguageBackbone, plainly
from lightrft.lightning_modules.pretrained import LoRA
from lightrft.media import MediaProcessor, placeholder_ids, stand_in
from lightrft.ops import Packed, log_probs_and_entropy, pack, split_by_tokens
from lightrft.samples import Reading


class ActorModule(LanguageBackbone):
    """Any language model of ``transformers``, of text alone or with images or audio, its dropout switched off.

    The constructor is cheap; weights and tokenizer load in :meth:`configure_model`.

    Args:
        model: name or folder of weights. Give this or ``config``.
        config: a model configuration (``model_type`` and what ``transformers.AutoConfig.for_model`` takes) for fresh
            weights.
        tokenizer: name or folder of the tokenizer, or of the processor around it; ``None`` takes it from ``model``.
        packing: feed packed rows (no padding computed). ``false`` pads: for architectures whose layers see across
            a packed row (state space, attention sinks, soft caps).
        gradient_checkpointing: keep no activations inside a block, compute them again in the backward.
        freeze: weights that stay as they are, by patterns of their names (``model.visual.*``); with ``lora``, layers
            without adapters.
        lora: train low-rank adapters instead of the weights.
        optimizer: builds the optimizer from the parameters.
        lr_scheduler: builds a schedule from the optimizer, stepped after each optimizer step; ``None`` is constant.

    Attributes:
        head_chunk_tokens: predictions whose logits are held at a time.
        head_in_step: whether all ranks must call the head equally often; ZeRO 3, which gathers it for each call, sets
            it.

    Raises:
        ValueError: none or both of ``model`` and ``config``; fresh weights without a tokenizer.
    """

    role: ClassVar[str] = "actor"
    difference: ClassVar[str] = (
        "other log-probs in our forward than in its own (by {gap:.3g} nats): its layers or head do more than causal "
        "attention and a linear map"
    )
    head_chunk_tokens: int = 1024
    head_in_step: bool = False

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        packing: bool = True,
        gradient_checkpointing: bool = False,
        freeze: list[str] | None = None,
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(model, config, packing, gradient_checkpointing, freeze, lora, optimizer, lr_scheduler)
        if model is None and tokenizer is None:
            raise ValueError("An actor with fresh weights needs a tokenizer (name or folder).")
        self.tokenizer_name = tokenizer or str(model)
        self.mean_loss = MeanMetric()

    # --- the model ---------------------------------------------------------------------------------------------------

    def _accept(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model whole, if it embeds every token of the tokenizer."""
        if any(name.endswith("video_tower") for name, _ in model.named_modules()):
            raise ValueError(
                f"{type(model).__name__} sees videos with weights of their own; LightRFT trains models that see them "
                "as they see images."
            )
        vocabulary = model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > vocabulary:
            raise ValueError(
                f"The tokenizer {self.tokenizer_name!r} has {len(self.tokenizer)} tokens but the model embeds only "
                f"{vocabulary}; use the model's own tokenizer or raise vocab_size."
            )
        return model

    @cached_property
    def processor(self) -> Any:
        """The tokenizer, or where the model reads media the ``ProcessorMixin`` around it.

        Loaded when first asked for: a LightningDataModule asks before the weights are there.
        """
        return pretrained.load_processor(self.tokenizer_name)

    @cached_property
    def media(self) -> MediaProcessor | None:
        """What reads images and audio with the processor; ``None`` where there is but a tokenizer."""
        return MediaProcessor.of(self.processor)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return getattr(self.processor, "tokenizer", self.processor)

    def frozen_copy(self) -> ActorModule:
        """A copy of these weights without gradients: the reference policy."""
        twin = copy.deepcopy(self).requires_grad_(False)
        return twin.eval()

    def export_parameters(
        self, skip: Container[str] = (), dtype: torch.dtype | None = None, merged: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Names of the plain ``transformers`` model and its weights, one at a time; tied weights once. Collective.

        Args:
            skip: names of weights that are not wanted; every rank skips the same.
            dtype: of floating ones; ``None`` is the trainer's.
            merged: adapters are added; ``False`` gives the base they adapt.
        """
        return pretrained.exported_weights(self.transformer, skip, dtype, merged)

    def export_adapter(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """LoRA's matrices, as :meth:`lightrft.engines.Engine.update_adapter` takes them. Collective."""
        return pretrained.exported_adapter(self.transformer, dtype)

    def frozen_parameters(self, merged: bool = True) -> frozenset[str]:
        """Names of exported weights that training leaves as they are; some that it does may be missing."""
        return pretrained.frozen_weights(self.transformer, merged)

    def tied_parameters(self) -> dict[str, str]:
        """Further names of exported weights (the head's, tied to the embedding): each with the exported one."""
        return pretrained.tied_weights(self.transformer)

    def save_pretrained(self, folder: Path) -> None:
        """Write a Hugging Face folder: weights (adapters merged), configuration, tokenizer.

        On all ranks together, as each may hold but a part; the first one writes.
        """
        pretrained.save_pretrained(self.transformer, self.processor, folder)

    def save_settings(self, folder: Path) -> None:
        """Write what such a folder holds besides weights, and LoRA's settings."""
        pretrained.save_settings(self.transformer, self.processor, folder)
        if self.lora is not None:
            pretrained.save_lora(self.language_model, self.name_or_path, folder)

    # --- log-probs of packed sequences -------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        predict: Tensor,
        media: dict[str, Tensor] | None = None,
        temperature: float = 1.0,
        adapter: bool = True,
        sampled: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the tokens after the ``predict`` positions, and the entropy they were drawn with.

        Args:
            input_ids: int64 ``[N]``, packed (:class:`lightrft.ops.Packed`).
            position_ids: int64 ``[N]``.
            cu_seqlens: int32 ``[S + 1]``.
            predict: int64 ``[M]``.
            media: what the model takes beside the tokens.
            temperature: divides the logits, as in sampling.
            adapter: ``False`` switches LoRA off: the reference policy.
            sampled: of the distribution that responses are drawn from, without placeholders of images or audio;
                ``False`` is of all tokens.

        Returns:
            ``(log_probs, entropy)``: at least float32 ``[M]``, nats.
        """

        def head(hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            return log_probs_and_entropy(
                hidden,
                input_ids[positions + 1],
                lambda h: pretrained.logits_of(self.transformer, h, self._never_drawn if sampled else ()),
                temperature=temperature,
                chunk_tokens=self.head_chunk_tokens,
                least_chunks=self._least_chunks(len(positions), hidden.device),
            )

        with nullcontext() if adapter else self._adapter_off():
            log_probs, entropy = self._at_predictions(input_ids, position_ids, cu_seqlens, predict, media or {}, head)
            return log_probs, entropy

    def _least_chunks(self, predictions: int, device: torch.device) -> int:
        if not self.head_in_step:
            return 1
        chunks = torch.tensor(-(-predictions // self.head_chunk_tokens), device=device)
        dist.all_reduce(chunks, op=dist.ReduceOp.MAX)
        return int(chunks)

    @cached_property
    def _never_drawn(self) -> tuple[int, ...]:
        return placeholder_ids(self.transformer.config)

    def _adapter_off(self) -> AbstractContextManager[None]:
        assert self.lora is not None, "only LoRA has an adapter to switch off"
        return self.language_model.disable_adapter()  # type: ignore[union-attr, operator]

    def _ours(self, packed: Packed) -> Tensor:
        log_probs, _ = self(*packed.inputs, sampled=False)
        return log_probs[:, None]

    def _theirs(self, alone: list[Packed]) -> tuple[Tensor, float]:
        log_p = torch.cat([plainly(self.transformer, one).logits[0, :-1].float() for one in alone]).log_softmax(-1)
        return log_p.gather(-1, torch.cat([one.input_ids[1:] for one in alone])[:, None]), float(log_p.std())

    def _examples(self, before: Tensor, after: Tensor) -> list[Reading]:
        if self.media is None or not self.media.kinds:
            return []
        reading = self.media.read(self.media.example(before.cpu(), self.media.kinds)).to(before.device)
        return [replace(reading, token_ids=torch.cat([reading.token_ids, after]))]

    # --- supervised training under Lightning's Trainer ---------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse Lightning's accumulation, which averages each batch by itself.

        Raises:
            ValueError: ``accumulate_grad_batches`` is not 1.
        """
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "accumulate_grad_batches weights every batch alike, whatever tokens it holds; keep it at 1, raise "
                "data.batch_size and set data.tokens_per_microbatch to bound memory."
            )

    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> Tensor:
        """Mean loss over the trained tokens of the whole step, all ranks together, one micro-batch in memory at a time.

        Args:
            batch: the optimizer step's sequences on this rank.
        """
        parts = self._micro_batches(batch)
        tokens = torch.tensor(float(sum(int(mask.sum()) for mask in batch.loss_masks)), device=self.device)
        total = self.trainer.strategy.reduce(tokens.clone(), reduce_op="sum")
        # Gradients are averaged over ranks; the sum over ranks is wanted.
        scale = self.trainer.world_size / total.clamp_min(1)
        losses = [
            # The backward computes all but a lone micro-batch again, so that one's activations are held at a time.
            checkpoint(self._negative_log_prob, part, use_reentrant=False) if len(parts) > 1 else
            self._negative_log_prob(part)
            for part in parts
        ]  # fmt: skip
        loss = torch.stack(losses).sum() * scale
        self.log("train_loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=len(batch))
        return loss

    def _micro_batches(self, batch: SupervisedBatch) -> list[Packed]:
        rows = split_by_tokens([len(sequence) for sequence in batch.sequences], batch.tokens_per_microbatch)
        if self.device_mesh is not None:
            # Sharded weights are gathered in every forward, so every rank needs as many.
            most = self.trainer.strategy.reduce(torch.tensor(len(rows), device=self.device), reduce_op="max")
            rows += [[]] * (int(most) - len(rows))
        return [_pack_supervised(self._in_step(batch.select(part))).to(self.device) for part in rows]

    def _in_step(self, part: SupervisedBatch) -> SupervisedBatch:
        """A micro-batch with something of every kind that the model reads, and with something at all.

        Ranks wait for each other's gradients of every weight, those of a tower too, whatever their own records hold.
        """
        kinds: frozenset[str] = frozenset()
        if self.media is not None:  # sharded weights are gathered for each kind that is looked at
            kinds = self.media.kinds if self.device_mesh is not None else self.media.apart
        least = stand_in(self.media, part.readings, kinds)
        return part if least is None else part.joined(least.to(self.device))

    def _negative_log_prob(self, packed: Packed) -> Tensor:
        log_probs, _ = self(*packed.inputs)
        return -log_probs.sum()

    def validation_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Token-weighted ``val_loss`` (nats) over the whole validation set, whatever the batches."""
        self._evaluate(batch, "val")

    def test_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`, logged as ``test_loss``."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: SupervisedBatch, stage: str) -> None:
        for packed in self._micro_batches(batch):
            tokens = len(packed.predict)
            loss = self._negative_log_prob(packed)
            if tokens:
                self.mean_loss.update(loss / tokens, tokens)
        self.log(f"{stage}_loss", self.mean_loss, prog_bar=True, on_epoch=True, on_step=False, batch_size=len(batch))

    def on_predict_start(self) -> None:
        """Refuse to predict with sharded weights, for which ranks with fewer sequences would not be waited.

        Raises:
            ValueError: the strategy is Lightning's model-parallel one.
        """
        if self.device_mesh is not None:
            raise ValueError("predict does not run under ModelParallelStrategy; use strategy ddp, or one device.")

    def predict_step(self, batch: SupervisedBatch, batch_idx: int) -> list[float]:
        """Summed log-prob (nats) of the trained tokens of each sequence, in order."""
        results = []
        for row in range(len(batch.sequences)):
            packed = _pack_supervised(batch.select([row])).to(self.device)
            results.append(-float(self._negative_log_prob(packed)))
        return results


def _pack_supervised(batch: SupervisedBatch) -> Packed:
    """Pack sequences whose every token but the first may be trained on: the "response" starts at token 1."""
    masks = [mask[1:] for mask in batch.loss_masks]
    padded = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_value=False)
    return pack(batch.sequences, torch.ones(len(batch), dtype=torch.int64), padded.bool(), batch.readings)
