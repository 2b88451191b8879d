"""Per-token policy losses.

Pure functions first, then :class:`Objective`, the axis as an algorithm takes it; a third party subclasses that.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightrft.algorithms.choice import Choice
from lightrft.algorithms.log_ratios import RatioLevel, at_level, difference, log_ratio, response_mean
from lightrft.samples import Batch

ObjectiveName = Literal["clipped_ratio", "clipped_log_prob", "clipped_weight"]


def clipped_ratio_loss(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> Tensor:
    """``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)`` (PPO, arXiv 1707.06347).

    Different bounds are the clip-higher of DAPO (arXiv 2503.14476). With ``dual_clip = c``, the loss for ``A < 0`` is
    at most ``-c * A`` (arXiv 1912.09729).

    Args:
        log_ratio: ``[B, T]`` or ``[B, 1]`` nats, clamped to +-20.
        advantages: ``[B, T]`` or ``[B, 1]``.
        clip_low, clip_high: how far the ratio may fall below and rise above 1.
        dual_clip: 0 is off; otherwise above 1.

    Returns:
        ``[B, T]``, or ``[B, 1]`` where both are.
    """
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def clipped_log_prob_loss(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """``-min(d * A, clip(d, ln(1 - clip_low), ln(1 + clip_high)) * A)``, ``d`` the log-ratio (CPGD, arXiv 2505.12504).

    The paper writes the log-prob for its ratio: the value is then shifted by a constant, the gradient is the same.
    Arguments and result as in :func:`clipped_ratio_loss`.
    """
    lowest = math.log1p(-clip_low) if clip_low < 1 else -math.inf
    clipped = log_ratio.clamp(lowest, math.log1p(clip_high))
    return -torch.minimum(log_ratio * advantages, clipped * advantages)


def clipped_weight_loss(
    log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """``-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * log_prob`` (CISPO, arXiv 2506.13585).

    Every token keeps a gradient; only its weight is bounded. A log-prob of -inf counts as -1e4.

    Args:
        log_ratio: ``[B, T]`` nats.
        log_probs: ``[B, T]`` nats, with gradient.
        advantages, clip_low, clip_high: as in :func:`clipped_ratio_loss`; ``clip_low = 1`` is no lower bound.

    Returns:
        ``[B, T]``.
    """
    weight = log_ratio.detach().exp().clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * difference(log_probs, torch.zeros_like(log_probs))


def geometric_loss(log_ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """``-exp(mean_t term) * A``, ``term = s min(s d, s clip(d, -low, high))``, ``s = sign(A)`` (GMPO, 2507.20673).

    Args:
        log_ratio: ``d``, ``[B, T]`` nats.
        advantages: ``[B, T]``, one number a response, or ``[B, 1]``.
        mask: bool ``[B, T]``.
        clip_low, clip_high: bounds of ``d`` in nats.

    Returns:
        ``[B, T]``: each token of a response shows the response's loss.
    """
    sign = advantages.sign()
    term = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-clip_low, clip_high))
    # Without an advantage there is nothing to clip; the loss is 0 whatever the ratio.
    return -response_mean(term, mask).exp() * advantages


def drift(log_ratio: Tensor) -> Tensor:
    """``exp(d) - 1 - d``: the k3 estimate of KL(old || new) by which CPGD (arXiv 2505.12504) holds the policy back."""
    return log_ratio.exp() - 1 - log_ratio


class PolicyTerms(NamedTuple):
    """What an objective says of every token, each ``[B, T]`` or ``[B, 1]``.

    Attributes:
        loss: with gradient; weighted by the corrections and aggregated by the algorithm.
        log_ratio: nats, of policy to old policy, as the objective takes it.
        clipped_low, clipped_high: bool; where a bound took the gradient (or cut the weight).
    """

    loss: Tensor
    log_ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


class Objective(Choice):
    """One choice on the axis of policy losses. Subclass it for a loss of your own and name the class in YAML.

    Attributes:
        per_response: a response has one loss, so its advantage must be one number.
    """

    per_response = False

    def __call__(self, log_probs: Tensor, batch: Batch) -> PolicyTerms | Tensor:
        """The loss of every trained token of a micro-batch, or with it what the metrics show.

        Nothing in it may depend on how a step is cut: reduce over the tokens of a response, never over responses.

        Args:
            log_probs: ``[B, T]`` nats under the policy, with gradient, 0 outside ``batch.response_mask``.
            batch: the micro-batch, with ``log_probs_old`` and ``advantages``.

        Returns:
            loss ``[B, T]``, or :class:`PolicyTerms`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__().")


class ClippedRatio(Objective):
    """:func:`clipped_ratio_loss` at the level of tokens or responses, or :func:`geometric_loss`."""

    def __init__(self, level: RatioLevel, clip_low: float, clip_high: float, dual_clip: float) -> None:
        self.level, self.low, self.high, self.dual_clip = level, clip_low, clip_high, dual_clip
        self.per_response = level in ("sequence", "geometric")

    def __call__(self, log_probs: Tensor, batch: Batch) -> PolicyTerms:
        d, mask = log_ratio(log_probs, batch.log_probs_old), batch.response_mask
        # The ratio of a response meets the advantages of its padding too.
        advantages = torch.where(mask, batch.advantages, 0.0)
        if self.level == "geometric":
            loss = geometric_loss(d, advantages, mask, self.low, self.high)
            return PolicyTerms(loss, d, (advantages < 0) & (d < -self.low), (advantages > 0) & (d > self.high))
        d = at_level(d, log_probs, mask, self.level)
        loss = clipped_ratio_loss(d, advantages, self.low, self.high, self.dual_clip)
        low, high = (advantages < 0) & (d.exp() < 1 - self.low), (advantages > 0) & (d.exp() > 1 + self.high)
        if self.dual_clip:
            high = high | ((advantages < 0) & (d.exp() > self.dual_clip))
        return PolicyTerms(loss, d, low, high)


class ClippedLogProb(Objective):
    """:func:`clipped_log_prob_loss`."""

    def __init__(self, clip_low: float, clip_high: float) -> None:
        self.low, self.high = clip_low, clip_high

    def __call__(self, log_probs: Tensor, batch: Batch) -> PolicyTerms:
        d, advantages = log_ratio(log_probs, batch.log_probs_old), batch.advantages
        loss = clipped_log_prob_loss(d, advantages, self.low, self.high)
        low, high = (advantages < 0) & (d.exp() < 1 - self.low), (advantages > 0) & (d.exp() > 1 + self.high)
        return PolicyTerms(loss, d, low, high)


class ClippedWeight(Objective):
    """:func:`clipped_weight_loss`."""

    def __init__(self, clip_low: float, clip_high: float) -> None:
        self.low, self.high = clip_low, clip_high

    def __call__(self, log_probs: Tensor, batch: Batch) -> PolicyTerms:
        d = log_ratio(log_probs, batch.log_probs_old)
        loss = clipped_weight_loss(d, log_probs, batch.advantages, self.low, self.high)
        return PolicyTerms(loss, d, d.exp() < 1 - self.low, d.exp() > 1 + self.high)
