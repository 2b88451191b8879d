"""What a backbone's forward and backward hold in memory, counted by running them on tensors without any.

The module's own code runs, every layer of it, on fake tensors: shapes, dtypes and lifetimes are those of a run, values
are not computed. Attention is counted as it is on a GPU: torch's variable-length kernel in half precision, rectangles
otherwise (:mod:`lightrft.ops.attention`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.optim import Optimizer
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lightrft.analysis.live_bytes import LiveBytes
from lightrft.lightning_modules import pretrained
from lightrft.lightning_modules.backbone import LanguageBackbone
from lightrft.ops.attention import has_kernel, in_autocast_dtype, kernel_attention
from lightrft.strategies import blocks

_COUNTED_ATTENTION = "lightrft_counted"

ACTIVATIONS, LOGITS, WEIGHT_COPIES, GRADIENTS = "activations", "logits", "weight copies", "gradients"


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of equal length that go through a model together.

    Attributes:
        sequences: how many.
        length: tokens of each.
        predictions: tokens of each that are trained on.
    """

    sequences: int
    length: int
    predictions: int

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * self.length


def without_weights(module: LanguageBackbone) -> None:
    """Configure ``module`` on the meta device: of a named model its configuration is read, not its weights.

    Raises:
        ValueError: there is no such model, or it does not fit the tokenizer.
    """
    if module.name_or_path is not None:
        module.model_config, module.name_or_path = pretrained.load_config(module.name_or_path), None
    with torch.device("meta"):
        module.configure_model()


class Footprint:
    """Counts what one micro-batch takes beyond the weights (and beyond gradients that are there already).

    Args:
        module: :func:`without_weights`.
        dtype: of the weights that the forward reads.
        autocast_dtype: what autocast computes in; ``None`` is no autocast.
        arguments: further ones of the module's forward.

    Every method returns bytes by name at the moment when they are most: ``activations`` (and what else a kernel's
    inputs and results take), ``logits``, ``weight copies`` (autocast's) and, where they are kept, ``gradients``.

    Raises:
        ValueError: the forward asks for values (of an expert router, say), and there are none to count with.
    """

    def __init__(
        self, module: LanguageBackbone, dtype: torch.dtype, autocast_dtype: torch.dtype | None = None, **arguments: Any
    ) -> None:
        self._mode = FakeTensorMode()
        self._module = _on_fake_tensors(module, dtype, self._mode)
        self._autocast_dtype, self._arguments = autocast_dtype, arguments
        self._weights = {parameter.untyped_storage()._cdata for parameter in self._module.parameters()}
        self._vocabulary = self._module.transformer.get_input_embeddings().num_embeddings
        self._attend()

    def evaluate(self, batch: MicroBatch, frozen: bool = False) -> dict[str, int]:
        """A forward without gradients; ``frozen`` weights are not kept in autocast's cache."""
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        self._module.eval()
        with torch.no_grad(), self._counting() as live:
            for parameter in trained:
                parameter.requires_grad_(not frozen)
            self._forward(batch)
            for parameter in trained:
                parameter.requires_grad_(True)
        return live.peak

    def train(self, batch: MicroBatch, keep_gradients: bool) -> dict[str, int]:
        """Forward and backward; gradients that are not kept are freed one by one as they come."""
        self._module.train()
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        with self._counting() as live:

            def came(parameter: Tensor) -> None:
                if keep_gradients and parameter.grad is not None:
                    live.rename(parameter.grad, GRADIENTS)
                else:
                    parameter.grad = None

            hooks = [parameter.register_post_accumulate_grad_hook(came) for parameter in trained]
            loss = self._forward(batch)
            loss.backward()
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
        # Named although the peak may come before the first of them: there are no others beside these.
        return live.peak | ({GRADIENTS: live.peak.get(GRADIENTS, 0)} if keep_gradients else {})

    def _counting(self) -> _Counting:
        ignored = [*self._module.parameters(), *self._module.buffers()]
        return _Counting(self._mode, LiveBytes(ignored, self._name), type(self._module.transformer).__name__)

    def _name(self, operation: Any, arguments: tuple[Any, ...], result: Tensor) -> str:
        if operation is torch.ops.aten._to_copy.default and self._is_weight(arguments[0]):
            return WEIGHT_COPIES
        is_logits = result.ndim == 2 and result.shape[-1] == self._vocabulary
        return LOGITS if is_logits else ACTIVATIONS

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._weights

    def _forward(self, batch: MicroBatch) -> Tensor:
        """Something to differentiate."""
        tokens = torch.zeros(batch.tokens, dtype=torch.int64)
        starts = torch.zeros(batch.sequences + 1, dtype=torch.int32)
        predict = torch.zeros(batch.sequences * batch.predictions, dtype=torch.int64)
        with self._autocast():
            found = self._module(tokens, torch.zeros_like(tokens), starts, predict, **self._arguments)
        outputs = found if isinstance(found, tuple) else (found,)
        return torch.stack([output.sum() for output in outputs]).sum()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast("cpu", dtype=self._autocast_dtype)

    def _attend(self) -> None:
        """Attention without a look at the values: of equal lengths, by the kernel that a GPU takes."""
        if self._module.packing:
            AttentionInterface.register(_COUNTED_ATTENTION, _counted_attention)
            AttentionMaskInterface.register(_COUNTED_ATTENTION, lambda *args, **kwargs: None)
            self._module.transformer.set_attn_implementation(_COUNTED_ATTENTION)
        else:
            self._module._padded_hidden = partial(_equal_rows, self._module)  # type: ignore[method-assign]


class _Counting:
    """A fake mode with a counter inside it."""

    def __init__(self, mode: FakeTensorMode, live: LiveBytes, architecture: str) -> None:
        self._mode, self._live, self._architecture = mode, live, architecture

    def __enter__(self) -> LiveBytes:
        self._mode.__enter__()
        self._live.__enter__()
        return self._live

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._live.__exit__(kind, error, trace)
        self._mode.__exit__(kind, error, trace)
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            raise ValueError(
                f"{self._architecture} decides by values which tensors it makes ({error}), so its memory cannot be "
                "told without running it."
            ) from error


def _on_fake_tensors(module: LanguageBackbone, dtype: torch.dtype, mode: FakeTensorMode) -> LanguageBackbone:
    """A copy whose tensors are fake ones of the CPU: the meta device has no autocast."""
    twin = copy.deepcopy(module)
    made: dict[Tensor, Tensor] = {}
    for part in twin.modules():
        for store, of in ((part._parameters, dtype), (part._buffers, None)):
            for name, tensor in store.items():
                if tensor is not None and tensor not in made:
                    made[tensor] = _fake(tensor, of, mode)
                if tensor is not None:
                    cast(dict[str, Any], store)[name] = made[tensor]
    return twin


def _fake(tensor: Tensor, dtype: torch.dtype | None, mode: FakeTensorMode) -> Tensor:
    with mode:
        made = torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _counted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As :func:`~lightrft.lightning_modules.packed_attention.packed_attention_forward`."""
    q, k, v = (in_autocast_dtype(states[0].transpose(0, 1)) for states in (query, key, value))
    if has_kernel(q, v):
        longest = q.shape[0] // (len(cu_seq_lens_q) - 1)
        return kernel_attention(q, k, v, cu_seq_lens_q, longest, 1.0, None)[None], None
    return _rectangles(q, k, v, len(cu_seq_lens_q) - 1)[None], None


def _rectangles(query: Tensor, key: Tensor, value: Tensor, sequences: int) -> Tensor:
    """Attention over padded sequences, which need no padding where they are of one length."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    joined = torch.cat([query, key, value], dim=-1)
    places = torch.arange(len(joined))
    padded = joined.new_zeros(joined.shape)
    padded[places] = joined
    rows = padded.unflatten(0, (sequences, -1)).transpose(1, 2)
    q, k, v = rows.split([query.shape[-1], key.shape[-1], value.shape[-1]], dim=-1)
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).flatten(0, 1)[places]


def _equal_rows(
    module: LanguageBackbone, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, media: dict[str, Tensor]
) -> Tensor:
    """``_padded_hidden`` of sequences of one length."""
    rows = input_ids.unflatten(0, (len(cu_seqlens) - 1, -1))
    out = module.transformer.base_model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
    return out.last_hidden_state.flatten(0, 1)


# --- sizes of the weights and of the optimizer ------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, tied ones counted once.

    Attributes:
        all, trained: of the model, and of those with gradients.
        block: of the largest transformer block.
        outside: of what is in no block, but for embeddings that are not the head too, which are a unit of their own.
        largest: of the largest tensor.
        adapted: of the largest one that adapters change.
    """

    all: int
    trained: int
    block: int
    outside: int
    largest: int
    adapted: int


def weights_of(module: LanguageBackbone) -> Weights:
    """Of a module :func:`without_weights`."""
    of_blocks = [_count(block) for block in blocks(module)]
    parameters = list(module.parameters())
    head, embeddings = module.transformer.get_output_embeddings(), module.transformer.get_input_embeddings()
    apart = 0 if head is not None and head.weight is embeddings.weight else _count(embeddings)
    return Weights(
        all=_count(module),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        block=max(of_blocks, default=0),
        outside=_count(module) - sum(of_blocks) - apart,
        largest=max(parameter.numel() for parameter in parameters),
        adapted=max((p.numel() for name, p in module.named_parameters() if ".base_layer." in name), default=0),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def optimizer_bytes(optimizer: Callable[[Any], Optimizer], dtype: torch.dtype) -> tuple[float, float]:
    """Bytes for each parameter of ``dtype``: of the optimizer's state, and of what a step takes for its time.

    Measured in steps of a real parameter of 256 x 256, as many at a time (``foreach``) as on a GPU.
    """
    parameter = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    made = optimizer([parameter])
    for group in made.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    parameter.grad = torch.zeros_like(parameter)
    made.step()
    held = [item for state in made.state.values() for item in state.values() if isinstance(item, Tensor)]
    with LiveBytes([parameter, parameter.grad, *held]) as live:
        made.step()
    state = sum(tensor.nbytes for tensor in held if tensor.numel() > 1)
    return state / parameter.numel(), sum(live.peak.values()) / parameter.numel()
