"""Our variable-length attention as an attention implementation of ``transformers``, selected by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lightrft.ops import sequence_parallel_attention, varlen_attention

PACKED_ATTENTION = "lightrft_packed"

# Arguments by which some architectures ask attention for more than causal softmax.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

# Layers that cu_seqlens keeps inside a sequence; a convolution or a linear attention runs over the row.
_SEGMENT_LAYERS = {"full_attention", "sliding_attention"}


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over one packed row; ``query`` is ``[1, H, N, D]``, the result ``[1, N, H, D_v]``.

    ``attention_mask`` is none, or the window of :func:`_window_of_mask`. With a ``sequence_group`` the row lies over
    its ranks (:mod:`lightrft.lightning_modules.sequence_parallel`) and ``N`` are this one's tokens.

    Raises:
        ValueError: called without ``cu_seq_lens_q``, or by an architecture that needs more than causal softmax.
    """
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked:
        raise ValueError(f"packed attention has no {', '.join(asked)}, which {type(module).__name__} needs")
    if cu_seq_lens_q is None:
        raise ValueError(f"cu_seq_lens_q does not reach {type(module).__name__}")
    if sliding_window is None and attention_mask is not None:
        sliding_window = int(attention_mask)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if sequence_group is None:
        out = varlen_attention(q, k, v, cu_seq_lens_q, scale=scale, window=sliding_window)
    else:
        out = sequence_parallel_attention(q, k, v, cu_seq_lens_q, sequence_group, scale=scale, window=sliding_window)
    return out[None], None


def select(model: PreTrainedModel, packing: bool, role: str) -> None:
    """Make the actor's or critic's (``role``) model attend over packed rows, or over padded ones as it was loaded to.

    Raises:
        ValueError: ``packing``, and the model has layers that cannot be kept inside the sequences of a row.
    """
    config = model.config.get_text_config()
    if packing:
        others = sorted(set(getattr(config, "layer_types", None) or ()) - _SEGMENT_LAYERS)
        if others or model._is_stateful:
            layers = f"layers of {', '.join(others)}" if others else "layers with a state"
            raise ValueError(
                f"{type(model).__name__} has {layers}, which cannot be kept inside the sequences of a packed row; set "
                f"packing: false on the {role}."
            )
        AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
        AttentionMaskInterface.register(PACKED_ATTENTION, _window_of_mask)
        _set(model, PACKED_ATTENTION)
    elif getattr(config, "attn_logit_softcapping", None) is not None:
        # scaled_dot_product_attention has no soft cap, and transformers drops it there without a word.
        model.set_attn_implementation("eager")


@contextmanager
def plain(model: PreTrainedModel) -> Iterator[None]:
    """Attention as the architecture itself spells it out."""
    used = model.config.get_text_config()._attn_implementation
    _set(model, "eager")
    try:
        yield
    finally:
        _set(model, used)


def _set(model: PreTrainedModel, implementation: str) -> None:
    """Of the text decoder; towers attend over their own items, as they were loaded to."""
    config, text = model.config, model.config.get_text_config()
    of_decoder = [name for name in config.sub_configs if getattr(config, name, None) is text]
    model.set_attn_implementation({of_decoder[0]: implementation} if of_decoder else implementation)


def _window_of_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """In place of the mask ``transformers`` asks for, its window: some families (Qwen2-MoE) name it nowhere else."""
    return None if local_size is None else torch.tensor(local_size)
