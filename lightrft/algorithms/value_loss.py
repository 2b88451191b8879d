"""Per-token losses of a critic, and how well it predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrft.ops.moments import Moments


def value_loss(values: Tensor, values_old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """``max((V - G)^2, (clip(V, V_old +- clip) - G)^2) / 2`` (PPO's implementation, arXiv 2005.12729).

    Args:
        values: ``[B, T]``, with gradient.
        values_old: ``[B, T]`` at the start of the update phase.
        returns: ``G``, ``[B, T]``.
        clip: how far a value may move; 0 is ``(V - G)^2 / 2``.

    Returns:
        ``[B, T]``.
    """
    plain = (values - returns).square()
    if clip:
        clipped = values_old + (values - values_old).clamp(-clip, clip)
        plain = torch.maximum(plain, (clipped - returns).square())
    return plain / 2


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """``1 - var(G - V) / var(G)`` of one-dimensional tensors: 1 is perfect, 0 as good as a constant (or of one)."""
    # Equality of the extremes, not a variance of 0: rounding gives equal numbers one just above it.
    if not len(returns) or bool(returns.max() == returns.min()):
        return 0.0
    return 1 - Moments.of(returns.double() - values.double()).variance / Moments.of(returns).variance
