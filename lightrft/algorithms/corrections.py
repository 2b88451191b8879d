"""Off-policy correction: weights for what the inference engine sampled from another distribution than the trainer's.

``x = log_probs_old - log_probs_rollout``, ``[B, T]`` nats. All weights are detached by construction: neither log-prob
carries a gradient. Truncated importance sampling: Yao et al. 2025, blog "Your efficient RL framework secretly brings
you off-policy RL training"; masks that keep the ratio inside: IcePop (Ling team 2025, blog).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightrft.algorithms.log_ratios import response_mean

Correction = Literal[
    "none",
    "token_tis",
    "sequence_tis",
    "token_mask",
    "sequence_mask",
    "geometric_mask",
    "token_mask_ratio",
    "sequence_mask_ratio",
    "geometric_mask_ratio",
]

BOUNDS = {
    "token_tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "token_mask": (0.5, 5.0),
    "sequence_mask": (0.5, 2.0),
    "geometric_mask": (0.99, 1.01),
}
"""Default ``(low, high)`` of the ratio, by correction; truncation has no lower one."""


def importance_ratio(mismatch: Tensor, mask: Tensor, correction: str) -> Tensor:
    """The ratio that a correction looks at: ``[B, T]`` for tokens, else ``[B, 1]``; log-ratios clamped to +-20.

    Args:
        mismatch: ``x``, ``[B, T]`` nats.
        mask: bool ``[B, T]``.
        correction: one of :data:`Correction` but ``none``.
    """
    x = torch.where(mask, mismatch, 0.0)
    if correction.startswith("sequence"):
        x = x.sum(-1, keepdim=True)
    elif correction.startswith("geometric"):
        x = response_mean(x, mask)
    return x.clamp(-20.0, 20.0).exp()


def correction_weights(
    mismatch: Tensor, mask: Tensor, correction: str, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Weights of the policy term, and where a bound made them.

    - ``token_tis``, ``sequence_tis``: ``min(ratio, high)``, the ratio of a token, or of a whole response.
    - ``token_mask``, ``sequence_mask``, ``geometric_mask``: 1 where the ratio (of a token; of a response; the geometric
      mean of a response's) lies in ``[low, high]``, else 0; with ``_ratio`` the ratio itself instead of 1.

    Args:
        mismatch, mask, correction: as in :func:`importance_ratio`.
        low, high: bounds of the ratio.

    Returns:
        ``(weights, bounded)``: ``[B, T]``, float and bool.
    """
    ratio = importance_ratio(mismatch, mask, correction)
    if correction.endswith("tis"):
        weights, bounded = ratio.clamp_max(high), ratio > high
    else:
        bounded = (ratio < low) | (ratio > high)
        weights = torch.where(bounded, 0.0, ratio if correction.endswith("_ratio") else torch.ones_like(ratio))
    return weights.expand_as(mismatch), bounded.expand_as(mismatch)


def response_weights(weights: Tensor, mask: Tensor) -> Tensor:
    """Geometric mean of a response's token weights ``[B, T]``, on each of its tokens: for losses of whole responses.

    Exactly 0 where one of them is.
    """
    return response_mean(weights.log(), mask).exp().expand_as(weights)


def effective_sample_size(weights: Tensor) -> float:
    """``(sum w)^2 / (n sum w^2)`` of ``n`` weights: 1 when all are equal, 0 when all are 0 or there are none."""
    squares = float(weights.double().square().sum())
    return float(weights.double().sum()) ** 2 / (len(weights) * squares) if squares else 0.0
