"""What actor and critic share: the layers of a causal language model over packed sequences, loaded and checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lightrft.lightning_modules import media_inputs, packed_attention, pretrained
from lightrft.lightning_modules.pretrained import LoRA
from lightrft.lightning_modules.sequence_parallel import SequenceParallel
from lightrft.media import placeholder_ids
from lightrft.ops import Packed, check_heads, pack, pad
from lightrft.samples import Reading
from lightrft.strategies import data_parallel, shard_blocks


class LanguageBackbone(LightningModule, ABC):
    """A causal language model of ``transformers``, its dropout switched off, whose hidden states a subclass reads.

    The constructor is cheap; weights load in :meth:`configure_model`. A subclass spells the arguments out, each with
    its default and its line of help: they are keys of the configuration.

    Args:
        model: name or folder of weights. Give this or ``config``.
        config: a model configuration for fresh weights.
        packing: feed packed rows, or pad.
        gradient_checkpointing: keep no activations inside a block.
        freeze: patterns of weights that stay as they are.
        lora: train low-rank adapters instead of the weights.
        optimizer: builds the optimizer from the parameters.
        lr_scheduler: builds a schedule from the optimizer; ``None`` is constant.

    Attributes:
        role: what messages call the module.
        difference: what the check against the plain forward says of a model that fails it by ``gap``.

    Raises:
        ValueError: none or both of ``model`` and ``config``.
    """

    role: ClassVar[str]
    difference: ClassVar[str] = (
        "other hidden states in our forward than in its own (by {gap:.3g}): its layers do more than causal attention"
    )

    def __init__(
        self,
        model: str | None,
        config: dict[str, Any] | None,
        packing: bool,
        gradient_checkpointing: bool,
        freeze: list[str] | None,
        lora: LoRA | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        if (model is None) == (config is None):
            raise ValueError(
                f"Give the {self.role} either model (name or folder of weights) or config (fresh weights)."
            )
        self.name_or_path = model
        self.model_config: Any = config
        self.packing = packing
        self.gradient_checkpointing = gradient_checkpointing
        self.freeze_patterns = freeze or []
        self.lora = lora
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.language_model: nn.Module | None = None
        self.sequence_parallel: SequenceParallel | None = None
        self._cutting: RemovableHandle | None = None

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the subclass makes of the hidden states."""

    def configure_model(self) -> None:
        """Load the weights, once; under Lightning's ``ModelParallelStrategy`` a shard of them on each rank (FSDP2).

        Raises:
            ValueError: they do not load, do not fit, or the model cannot be packed; or the strategy is tensor parallel;
                says what to set.
        """
        if self.language_model is not None:
            return
        if self.device_mesh is None:
            return self._load()
        mesh = data_parallel(self.device_mesh)
        with torch.device("meta") if mesh.get_rank() else nullcontext():  # rank 0 alone holds all, and gives it out
            self._load()
        shard_blocks(self, mesh)

    def _load(self) -> None:
        loaded = pretrained.load_model(self.name_or_path, self.model_config)
        packed_attention.select(loaded, self.packing, self.role)
        pretrained.freeze(loaded, self.freeze_patterns)  # names are the whole model's, for a critic too
        model = self._accept(loaded)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.language_model = model if self.lora is None else pretrained.add_lora(model, self.lora)
        try:
            self._check_against_plain_forward()
        except ValueError:
            self.language_model = None  # or a second call would take it for checked
            raise

    @abstractmethod
    def _accept(self, model: PreTrainedModel) -> PreTrainedModel:
        """What is kept of a loaded model; ``ValueError`` where it does not fit the rest."""

    @property
    def transformer(self) -> PreTrainedModel:
        """The ``transformers`` model, adapters inside if there are any."""
        if self.language_model is None:
            raise RuntimeError(f"The {self.role} has no weights yet; configure_model() loads them.")
        return self.language_model.get_base_model() if self.lora is not None else self.language_model  # type: ignore

    @property
    def may_leave_weights_unused(self) -> bool:
        """Whether some may never get a gradient: layers of a tower behind the one that is read (LLaVA)."""
        config = self.transformer.config
        return config.get_text_config() is not config

    def shard_sequences(self, group: dist.ProcessGroup | None) -> None:
        """Share every packed row out over the ranks of ``group``, from the decoder's input to the head.

        Called after :meth:`configure_model`, before a strategy wraps the module. All ranks of the group must then be
        given the same row and compute the same loss; the gradient of the weights is the *sum* over ranks. A copy made
        afterwards shares out too.

        Args:
            group: its size is the degree; ``None``, or a group of one, keeps rows whole.

        Raises:
            ValueError: the module pads, or its heads are no multiple of the degree; says what to set.
        """
        if self._cutting is not None:
            self._cutting.remove()
        self.sequence_parallel = self._cutting = None
        if group is None or (degree := dist.get_world_size(group)) == 1:
            return
        if not self.packing:
            raise ValueError(
                f"Sequence parallelism shares out packed rows, but the {self.role} pads; set packing: true on it, or "
                "sequence_parallel_size: 1."
            )
        check_heads(self.transformer.config.get_text_config().num_attention_heads, degree)
        self.sequence_parallel = SequenceParallel(group)
        self._cutting = self.sequence_parallel.enter(self.transformer.get_decoder())

    def _at_predictions(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        predict: Tensor,
        media: dict[str, Tensor],
        compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """What ``compute`` makes of hidden states ``[K, H]`` and their positions ``[K]``: each ``[M]``, of ``predict``.

        ``K`` is ``M``, or what this rank's slice has of it where sequences are sharded.
        """
        hidden = self._hidden(input_ids, position_ids, cu_seqlens, media)
        if self.sequence_parallel is None:
            return compute(hidden[predict], predict)
        return self.sequence_parallel.at_predictions(hidden, predict, len(input_ids), compute)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, media: dict[str, Tensor]) -> Tensor:
        """Last hidden states ``[N, H]`` of packed tokens; of this rank's slice where sequences are sharded."""
        compute = self._packed_hidden if self.packing else self._padded_hidden
        return compute(input_ids, position_ids, cu_seqlens, media)

    def _packed_hidden(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, media: dict[str, Tensor]
    ) -> Tensor:
        model = self.transformer.base_model
        out = model(
            input_ids=input_ids[None],
            position_ids=media_inputs.positions(model, input_ids, position_ids, cu_seqlens, media),
            cu_seq_lens_q=cu_seqlens,
            use_cache=False,
            **media_inputs.of_model(model, media, lambda of_tokens: of_tokens[None]),
        )
        return out.last_hidden_state[0]

    def _padded_hidden(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, media: dict[str, Tensor]
    ) -> Tensor:
        model = self.transformer.base_model
        padded, mask = pad(input_ids, cu_seqlens)
        out = model(
            input_ids=padded,
            attention_mask=mask.long(),
            use_cache=False,
            **media_inputs.of_model(model, media, lambda of_tokens: pad(of_tokens, cu_seqlens)[0]),
        )
        return out.last_hidden_state[mask]

    @torch.no_grad()
    def _check_against_plain_forward(self) -> None:
        """Compare short sequences with the model's own forward, one by one: heads and layers differ by family."""
        training, model = self.training, self.transformer
        device = next(model.parameters()).device
        if device.type == "meta":
            return
        advice = f"set packing: false on the {self.role}" if self.packing else "this architecture is not supported"
        self.eval()
        known = torch.arange(model.get_input_embeddings().num_embeddings, device=device)
        text = known[~torch.isin(known, torch.tensor(placeholder_ids(model.config), device=device))][:11]
        ids = text[torch.arange(11, device=device) % len(text)]
        readings = [Reading(ids[:5]), *self._examples(ids[2:7], ids[3:9]), Reading(ids[4:])]
        with _exact_float32():
            try:
                ours = self._ours(_whole(readings))
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{type(model).__name__} does not run in our forward ({error}); {advice}.") from error
            with packed_attention.plain(model):
                theirs, spread = self._theirs([_whole([reading]) for reading in readings])
        self.train(training)
        gap = float((ours - theirs).norm(dim=-1).max())
        # In proportion, as all outputs of fresh weights are nearly equal, whatever the layers do.
        if not gap < 1e-3 * spread:
            raise ValueError(f"{type(model).__name__} gives {self.difference.format(gap=gap)}; {advice}.")

    def _ours(self, packed: Packed) -> Tensor:
        """What the check compares, ``[K, D]``, by our forward of all sequences together."""
        return self._hidden(packed.input_ids, packed.position_ids, packed.cu_seqlens, packed.media)

    def _theirs(self, alone: list[Packed]) -> tuple[Tensor, float]:
        """The same by the model's own forward of each, and how far apart its outputs lie."""
        hidden = torch.cat([plainly(self.transformer.base_model, one).last_hidden_state[0] for one in alone])
        return hidden, float(hidden.std(0).norm())

    def _examples(self, before: Tensor, after: Tensor) -> list[Reading]:
        """Further sequences for the check: media between these tokens, where the module knows how they are read."""
        return []

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(f"freeze {self.freeze_patterns} leaves the {self.role} nothing to train; take some away.")
        optimizer = self.optimizer(trained)
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }


def _whole(readings: list[Reading]) -> Packed:
    """Sequences in one row, tokens 1.. of each to be predicted."""
    sequences = [reading.token_ids for reading in readings]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = torch.arange(int(lengths.max()) - 1) < lengths[:, None] - 1
    device = sequences[0].device
    return pack(sequences, torch.ones_like(lengths, device=device), mask.to(device), readings).to(device)


def plainly(model: PreTrainedModel, alone: Packed) -> Any:
    """What the model itself makes of one sequence, positions too."""
    media = media_inputs.of_model(model, alone.media, lambda of_tokens: of_tokens[None])
    return model(input_ids=alone.input_ids[None], use_cache=False, **media)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """No TF32, whose rounding would look like another architecture."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
