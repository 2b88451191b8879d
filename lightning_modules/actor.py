"""The actor: a causal language model that trains supervised under Lightning's Trainer and is the policy in RL."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightrft.data.supervised_data import SupervisedBatch
from lightrft.lightning_modules import packed_attention, pretrained
from lightrft.lightning_modules.pretrained import LoRA
from lightrft.ops import Packed, log_probs_and_entropy, pack, pad, split_by_tokens


class ActorModule(LightningModule):
    """Any causal language model of ``transformers``, its dropout switched off.

    The constructor is cheap; weights and tokenizer load in :meth:`configure_model`.

    Args:
        model: name or folder of weights. Give this or ``config``.
        config: a model configuration (``model_type`` and what ``transformers.AutoConfig.for_model`` takes) for fresh
            weights.
        tokenizer: name or folder; ``None`` takes it from ``model``.
        packing: feed packed rows (no padding computed). ``false`` pads: for architectures whose layers see across
            a packed row (state space, attention sinks, soft caps).
        gradient_checkpointing: keep no activations inside a block, compute them again in the backward.
        lora: train low-rank adapters instead of the weights.
        optimizer: builds the optimizer from the parameters.
        lr_scheduler: builds a schedule from the optimizer, stepped after each optimizer step; ``None`` is constant.

    Raises:
        ValueError: none or both of ``model`` and ``config``; fresh weights without a tokenizer.
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        packing: bool = True,
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if (model is None) == (config is None):
            raise ValueError("Give the actor either model (name or folder of weights) or config (fresh weights).")
        if model is None and tokenizer is None:
            raise ValueError("An actor with fresh weights needs a tokenizer (name or folder).")
        self.name_or_path = model
        self.model_config = config
        self.tokenizer_name = tokenizer or str(model)
        self.packing = packing
        self.gradient_checkpointing = gradient_checkpointing
        self.lora = lora
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.language_model: nn.Module | None = None
        self.mean_loss = MeanMetric()

    # --- the model ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load weights and tokenizer, once.

        Raises:
            ValueError: they do not load, do not fit each other, or the model cannot be packed; says what to set.
        """
        if self.language_model is not None:
            return
        model = pretrained.load_model(self.name_or_path, self.model_config)
        packed_attention.select(model, self.packing)
        vocabulary = model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > vocabulary:
            raise ValueError(
                f"The tokenizer {self.tokenizer_name!r} has {len(self.tokenizer)} tokens but the model embeds only "
                f"{vocabulary}; use the model's own tokenizer or raise vocab_size."
            )
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.language_model = model if self.lora is None else pretrained.add_lora(model, self.lora)
        try:
            self._check_against_plain_forward()
        except ValueError:
            self.language_model = None  # or a second call would take it for checked
            raise

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loaded when first asked for: a LightningDataModule asks before the weights are there."""
        return pretrained.load_tokenizer(self.tokenizer_name)

    @property
    def transformer(self) -> PreTrainedModel:
        """The ``transformers`` model, adapters inside if there are any."""
        if self.language_model is None:
            raise RuntimeError("The actor has no weights yet; configure_model() loads them.")
        return self.language_model.get_base_model() if self.lora is not None else self.language_model  # type: ignore

    def frozen_copy(self) -> ActorModule:
        """A copy of these weights without gradients: the reference policy."""
        twin = copy.deepcopy(self).requires_grad_(False)
        return twin.eval()

    def export_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names of the plain ``transformers`` model and its weights, adapters merged; tied weights once."""
        return pretrained.merged_weights(self.transformer)

    def save_pretrained(self, folder: Path) -> None:
        """Write a Hugging Face folder: weights (adapters merged), configuration, tokenizer."""
        pretrained.save_pretrained(self.transformer, self.tokenizer, folder)

    # --- log-probs of packed sequences -------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        predict: Tensor,
        temperature: float = 1.0,
        adapter: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the tokens after the ``predict`` positions, and the entropy they were drawn with.

        Args:
            input_ids: int64 ``[N]``, packed (:class:`lightrft.ops.Packed`).
            position_ids: int64 ``[N]``.
            cu_seqlens: int32 ``[S + 1]``.
            predict: int64 ``[M]``.
            temperature: divides the logits, as in sampling.
            adapter: ``False`` switches LoRA off: the reference policy.

        Returns:
            ``(log_probs, entropy)``: at least float32 ``[M]``, nats.
        """
        with nullcontext() if adapter else self._adapter_off():
            hidden = (self._packed_hidden if self.packing else self._padded_hidden)(input_ids, position_ids, cu_seqlens)
            return log_probs_and_entropy(
                hidden[predict],
                input_ids[predict + 1],
                lambda h: pretrained.logits_of(self.transformer, h),
                temperature=temperature,
            )

    def _packed_hidden(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        out = self.transformer.base_model(
            input_ids=input_ids[None], position_ids=position_ids[None], cu_seq_lens_q=cu_seqlens, use_cache=False
        )
        return out.last_hidden_state[0]

    def _padded_hidden(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        padded, mask = pad(input_ids, cu_seqlens)
        out = self.transformer.base_model(input_ids=padded, attention_mask=mask.long(), use_cache=False)
        return out.last_hidden_state[mask]

    def _adapter_off(self) -> AbstractContextManager[None]:
        assert self.lora is not None, "only LoRA has an adapter to switch off"
        return self.language_model.disable_adapter()  # type: ignore[union-attr, operator]

    @torch.no_grad()
    def _check_against_plain_forward(self) -> None:
        """Compare two short sequences with the model's own forward, one by one: heads and layers differ by family."""
        training, model = self.training, self.transformer
        device = next(model.parameters()).device
        if device.type == "meta":
            return
        advice = "set packing: false on the actor" if self.packing else "this architecture is not supported"
        self.eval()
        ids = torch.arange(11, device=device) % model.get_input_embeddings().num_embeddings
        sequences, lengths = [ids[:5], ids[4:]], torch.ones(2, dtype=torch.int64, device=device)
        mask = torch.arange(6, device=device) < torch.tensor([[4], [6]], device=device)
        packed = pack(sequences, lengths, mask)
        with _exact_float32():
            try:
                ours, _ = self(packed.input_ids, packed.position_ids, packed.cu_seqlens, packed.predict)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{type(model).__name__} does not run in our forward ({error}); {advice}.") from error
            with packed_attention.plain(model):
                logits = [model(input_ids=s[None], use_cache=False).logits[0, :-1].float() for s in sequences]
        self.train(training)
        log_p = torch.cat(logits).log_softmax(-1)
        gap = float((ours - log_p.gather(-1, torch.cat([s[1:] for s in sequences])[:, None])[:, 0]).abs().max())
        # In proportion, as all log-probs of fresh weights are nearly equal, whatever the layers do.
        if not gap < 1e-3 * float(log_p.std()):
            raise ValueError(
                f"{type(model).__name__} gives other log-probs in our forward than in its own (by {gap:.3g} nats): "
                f"its layers or head do more than causal attention and a linear map; {advice}."
            )

    # --- supervised training under Lightning's Trainer ---------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

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
        return [_pack_supervised(batch, part).to(self.device) for part in rows]

    def _negative_log_prob(self, packed: Packed) -> Tensor:
        log_probs, _ = self(packed.input_ids, packed.position_ids, packed.cu_seqlens, packed.predict)
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
            if tokens:
                self.mean_loss.update(self._negative_log_prob(packed) / tokens, tokens)
        self.log(f"{stage}_loss", self.mean_loss, prog_bar=True, on_epoch=True, on_step=False, batch_size=len(batch))

    def predict_step(self, batch: SupervisedBatch, batch_idx: int) -> list[float]:
        """Summed log-prob (nats) of the trained tokens of each sequence, in order."""
        results = []
        for row in range(len(batch.sequences)):
            packed = _pack_supervised(batch, [row]).to(self.device)
            results.append(-float(self._negative_log_prob(packed)))
        return results


def _pack_supervised(batch: SupervisedBatch, rows: list[int]) -> Packed:
    """Pack sequences whose every token but the first may be trained on: the "response" starts at token 1."""
    masks = [batch.loss_masks[row][1:] for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_value=False)
    return pack([batch.sequences[row] for row in rows], torch.ones(len(rows), dtype=torch.int64), padded.bool())


@contextmanager
def _exact_float32() -> Iterator[None]:
    """No TF32, whose rounding would look like another architecture."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
