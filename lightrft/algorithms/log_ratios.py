"""Differences of log-probs: finite whatever the log-probs are, and at the levels that objectives take ratios at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RatioLevel = Literal["token", "sequence", "sequence_token", "geometric"]

# Nats. Only a token that the sampling or the model forbids has a log-prob below it.
_LOWEST = -1e4


def difference(log_probs: Tensor, others: Tensor) -> Tensor:
    """``log_probs - others`` ``[B, T]``, where a log-prob of -inf counts as -1e4: two of them differ by 0.

    A NaN stays one, so that a model or an engine that gives it is seen.
    """
    return log_probs.clamp_min(_LOWEST) - others.clamp_min(_LOWEST)


def log_ratio(log_probs: Tensor, log_probs_old: Tensor) -> Tensor:
    """``log_probs - log_probs_old`` clamped to +-20, so that its exponential is finite. ``[B, T]``, nats."""
    return difference(log_probs, log_probs_old).clamp(-20.0, 20.0)


def response_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row over ``mask``: ``[B, 1]``, 0 for a row without any."""
    total = torch.where(mask, values, 0.0).sum(-1, keepdim=True)
    return total / mask.sum(-1, keepdim=True).clamp_min(1)


def at_level(log_ratio: Tensor, log_probs: Tensor, mask: Tensor, level: RatioLevel) -> Tensor:
    """The log-ratio that each token's loss sees.

    - ``token``: its own.
    - ``sequence``: the mean over its response (GSPO, arXiv 2507.18071, equation 7).
    - ``sequence_token``: the same value, its gradient the token's own (GSPO-token, equation 14).

    Args:
        log_ratio: ``[B, T]`` nats, from :func:`log_ratio`.
        log_probs: ``[B, T]`` nats, with gradient.
        mask: bool ``[B, T]``.
        level: see above.

    Returns:
        ``[B, T]`` or ``[B, 1]`` nats.
    """
    if level == "token":
        return log_ratio
    mean = response_mean(log_ratio, mask)
    if level == "sequence":
        return mean
    finite = difference(log_probs, torch.zeros_like(log_probs))
    # The bracket is exactly 0: added one by one, a large log-prob would round the mean.
    return mean.detach() + (finite - finite.detach())
