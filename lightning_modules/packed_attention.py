"""Our variable-length attention as an attention implementation of ``transformers``, selected by its name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lightrft.ops import varlen_attention

PACKED_ATTENTION = "lightrft_packed"

# Arguments by which some architectures ask attention for more than causal softmax.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over one packed row; ``query`` is ``[1, H, N, D]``, the result ``[1, N, H, D]``.

    Raises:
        ValueError: called without ``cu_seq_lens_q``, or by an architecture that needs more than causal softmax.
    """
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked or cu_seq_lens_q is None:
        why = f"{type(module).__name__} needs {', '.join(asked)}" if asked else "cu_seq_lens_q is missing"
        raise ValueError(f"Packed attention cannot run: {why}. Set packing: false on the actor.")
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return varlen_attention(q, k, v, cu_seq_lens_q, scale=scale, window=sliding_window)[None], None


def register() -> None:
    """Make ``attn_implementation="lightrft_packed"`` known to ``transformers``; no mask is ever built for it."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, lambda *args, **kwargs: None)
