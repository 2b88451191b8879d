"""Per-token policy losses."""

from __future__ import annotations

import torch
from torch import Tensor


def log_ratio(log_probs: Tensor, log_probs_old: Tensor) -> Tensor:
    """``log_probs - log_probs_old`` clamped to +-20, so that its exponential is finite. ``[B, T]``, nats."""
    return (log_probs - log_probs_old).clamp(-20.0, 20.0)


def clipped_ratio_loss(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)`` (PPO, arXiv 1707.06347).

    Different bounds are the clip-higher of DAPO (arXiv 2503.14476).

    Args:
        log_ratio: ``[B, T]``, from :func:`log_ratio`.
        advantages: ``[B, T]`` or ``[B, 1]``.
        clip_low, clip_high: how far the ratio may fall below and rise above 1.

    Returns:
        ``[B, T]``.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
