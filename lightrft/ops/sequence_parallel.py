"""Attention over a packed row whose tokens lie on several ranks (DeepSpeed-Ulysses, arXiv 2309.14509)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.ops.attention import in_autocast_dtype, varlen_attention


def check_heads(heads: int, degree: int) -> None:
    """Raise ``ValueError`` where query heads cannot be dealt out evenly to ``degree`` ranks; with the numbers."""
    if heads % degree:
        divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        raise ValueError(
            f"{heads} attention heads cannot be shared out evenly over {degree} ranks; set sequence_parallel_size to a "
            f"divisor of {heads} ({divisors})."
        )


def sequence_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    group: dist.ProcessGroup,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """:func:`varlen_attention` where each rank of ``group`` holds as many tokens of the row, in the order of ranks.

    An all-to-all trades tokens for heads: every rank attends over the whole row with its share of the heads, and a
    second one trades back. A key/value head goes to every rank that has a query head of its group. Collective, in the
    backward too.

    Args:
        query: ``[N / P, H_q, D]`` of ``P`` ranks.
        key: ``[N / P, H_kv, D]``; ``H_q`` is a multiple of ``H_kv``.
        value: ``[N / P, H_kv, D_v]``.
        cu_seqlens: int32 ``[S + 1]``, of the whole row.
        group: the ranks.
        scale, window: as :func:`varlen_attention` takes them.

    Returns:
        ``[N / P, H_q, D_v]``.

    Raises:
        ValueError: ``H_q`` is no multiple of ``P``.
    """
    degree = dist.get_world_size(group)
    check_heads(query.shape[1], degree)
    # As often as makes them a multiple of the degree; that divides the query heads, as both of its factors do.
    copies = degree // math.gcd(key.shape[1], degree)
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    states = [in_autocast_dtype(x) for x in (query, key, value)]
    received = _AllToAll.apply(_by_rank(states, degree), group)
    query, key, value = _by_head(received, states, degree)
    out = varlen_attention(query, key, value, cu_seqlens, scale=scale, window=window)
    back = _AllToAll.apply(out.unflatten(0, (degree, -1)), group)
    return back.transpose(0, 1).flatten(1, 2)


def _by_rank(states: list[Tensor], degree: int) -> Tensor:
    """What each rank is sent: ``[P, N / P, W]``, its heads of all states beside one another."""
    return torch.cat([x.unflatten(1, (degree, -1)).transpose(0, 1).flatten(2) for x in states], dim=-1)


def _by_head(received: Tensor, states: list[Tensor], degree: int) -> list[Tensor]:
    """``[N, H / P, D]`` of each state, out of what all ranks sent."""
    widths = [x.shape[1] // degree * x.shape[2] for x in states]
    parts = received.flatten(0, 1).split(widths, dim=-1)
    return [part.unflatten(1, (-1, x.shape[2])) for part, x in zip(parts, states)]


class _AllToAll(torch.autograd.Function):
    """Block ``i`` of the first axis goes to rank ``i``, and gradients back the way the values came."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, blocks.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None


def sum_of_parts(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, whose gradient each rank takes as its own: for a loss that every rank computes alike.

    The loss is then counted once, and gradients of weights *summed* over the ranks are those of the whole. Collective.

    Args:
        parts: this rank's, any shape, the same on all ranks.
        group: the ranks.
    """
    return _SumOfParts.apply(parts, group)


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = parts.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
