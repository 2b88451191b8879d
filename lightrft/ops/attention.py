"""Causal attention inside the segments of a packed row of tokens."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightrft.ops.packing import pad

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """Attention of every token to itself and the tokens before it in its own segment.

    In half precision on a GPU this is torch's variable-length flash attention. Elsewhere, and where values have another
    width than keys, the segments are padded to rectangles for ``scaled_dot_product_attention``: right padding with a
    causal mask needs no other mask.

    Args:
        query: ``[N, H_q, D]``. Under autocast float32 becomes the autocast dtype, as in torch's own attention.
        key: ``[N, H_kv, D]``; ``H_q`` is a multiple of ``H_kv``.
        value: ``[N, H_kv, D_v]``.
        cu_seqlens: int32 ``[S + 1]``.
        scale: multiplies the scores before the softmax.
        window: a token sees at most this many tokens, itself included; ``None`` is all.

    Returns:
        ``[N, H_q, D_v]``.
    """
    query, key, value = (in_autocast_dtype(states) for states in (query, key, value))
    if query.is_cuda and has_kernel(query, value):
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return kernel_attention(query, key, value, cu_seqlens, longest, scale, window)
    return _padded_attention(query, key, value, cu_seqlens, scale, window)


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the variable-length kernel takes these on a GPU."""
    return query.dtype in _KERNEL_DTYPES and value.shape[-1] == query.shape[-1]


def kernel_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """:func:`varlen_attention` by torch's kernel; ``longest`` is the most tokens of a segment."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (window - 1 if window else -1, 0)}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch before 2.13
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return cast(
        Tensor, varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, **options)
    )


def in_autocast_dtype(states: Tensor) -> Tensor:
    """Norms of queries and keys leave them in float32, beside values in half precision: no kernel takes such a mix."""
    device = states.device.type
    if states.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return states.to(torch.get_autocast_dtype(device))
    return states


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, window: int | None
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    padded, mask = pad(torch.cat([query, key, value], dim=-1), cu_seqlens)
    widths = [query.shape[-1], key.shape[-1], value.shape[-1]]
    q, k, v = padded.transpose(1, 2).split(widths, dim=-1)
    band = None
    if window is not None and window < q.shape[2]:
        position = torch.arange(q.shape[2], device=q.device)
        distance = position[:, None] - position
        band = (distance >= 0) & (distance < window)
    out = scaled_dot_product_attention(q, k, v, attn_mask=band, is_causal=band is None, scale=scale)
    return out.transpose(1, 2)[mask]
