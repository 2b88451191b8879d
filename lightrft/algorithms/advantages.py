"""Advantages: how much better a response was than what was expected of it.

Pure functions first, then :class:`Advantage`, the axis as an algorithm takes it; a third party subclasses that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightrft.algorithms.choice import Choice
from lightrft.ops.moments import Moments
from lightrft.samples import Batch

Gather = Callable[[Tensor], Tensor]
"""Joins a one-dimensional tensor of every rank, in the order of ranks."""


def _group_statistics(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean-centred rewards, their group's std (Bessel) and size, each ``[B]``; all 0 where a group has no spread."""
    centred, std, size = (torch.zeros_like(rewards) for _ in range(3))
    for group in torch.unique(group_ids):
        members = (group_ids == group) & valid
        scores = rewards[members]
        # Equality of the extremes, not a std of 0: rounding gives equal rewards a std just above it.
        if len(scores) > 1 and scores.max() > scores.min():
            centred[members] = scores - scores.mean()
            std[members] = scores.std(correction=1)
            size[members] = len(scores)
    return centred, std, size


def has_spread(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """Whether a response's group has two valid members of different reward: bool ``[B]``, also for its other members.

    Arguments as in :func:`group_norm`.
    """
    spread = torch.zeros_like(valid)
    for group in torch.unique(group_ids):
        members = group_ids == group
        scores = rewards[members & valid]
        spread[members] = len(scores) > 1 and bool(scores.max() > scores.min())
    return spread


def group_norm(rewards: Tensor, group_ids: Tensor, valid: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``(R - mean_group) / (std_group + epsilon)`` (GRPO, arXiv 2402.03300).

    Args:
        rewards: ``[B]``.
        group_ids: int64 ``[B]``; equal for responses to one prompt.
        valid: bool ``[B]``; responses that are trained on, the only ones that enter a group's mean.
        epsilon: added to the std, which has Bessel's correction.

    Returns:
        ``[B]``; exactly 0 for a group of one, for equal rewards, and where not ``valid``.
    """
    centred, std, _ = _group_statistics(rewards, group_ids, valid)
    return centred / (std + epsilon)


def group_mean(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """``R - mean_group`` (Dr.GRPO, arXiv 2503.20783). Arguments and result as in :func:`group_norm`."""
    return _group_statistics(rewards, group_ids, valid)[0]


def rloo(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """``R_i - mean of the others`` of its group (RLOO, arXiv 2402.14740). As in :func:`group_norm`."""
    centred, _, size = _group_statistics(rewards, group_ids, valid)
    return centred * size / (size - 1).clamp_min(1)


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438).

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lambda A_{t+1}``, where ``t + 1`` is the next token
    in ``mask`` and ``V`` after the last is 0.

    Args:
        token_rewards: ``[B, T]``.
        values: ``[B, T]`` of the state before each token.
        mask: bool ``[B, T]``.
        gamma: discount a token.
        gae_lambda: 1 is the return minus the value, 0 the one-step error.

    Returns:
        advantages and returns (``A + V``), each ``[B, T]``, 0 outside the mask.
    """
    advantages = torch.zeros_like(token_rewards)
    next_value = next_advantage = torch.zeros_like(token_rewards[:, 0])
    for t in reversed(range(token_rewards.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        valid = mask[:, t]
        advantages[:, t] = torch.where(valid, advantage, 0.0)
        next_advantage = torch.where(valid, advantage, next_advantage)
        next_value = torch.where(valid, values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0.0)


def rewards_to_go(token_rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """``sum over s >= t of gamma^(s-t) r_s``, counting tokens in ``mask`` (REINFORCE, Williams 1992): ``[B, T]``."""
    return gae(token_rewards, torch.zeros_like(token_rewards), mask, gamma, 1.0)[0]


def whiten(advantages: Tensor, mask: Tensor, gather: Gather) -> Tensor:
    """``(A - mean) / sqrt(var + 1e-8)`` over the step's tokens, variance with Bessel's correction.

    Args:
        advantages: ``[B, T]``.
        mask: bool ``[B, T]``.
        gather: the step is that of all ranks.

    Returns:
        ``[B, T]``; exactly 0 outside the mask, for fewer than two tokens and for equal advantages.
    """
    step = gather(advantages[mask])
    if len(step) < 2 or bool(step.max() == step.min()):
        return torch.zeros_like(advantages)
    moments = Moments.of(step)
    return torch.where(mask, (advantages - moments.mean) * (moments.variance + 1e-8) ** -0.5, 0.0)


class Advantage(Choice):
    """One choice on the advantage axis. Subclass it for an estimator of your own and name the class in YAML.

    Attributes:
        per_response: the advantage is one number a response, which objectives of whole responses need.
        compares_group: it is 0 in a group of one and in a group of equal rewards.
        needs_values: it reads ``batch.values_old``, so there must be a critic.
        needs_greedy: it reads ``batch.greedy_rewards``, so a greedy response is sampled for every prompt.
        whitens: it is whitened over the optimizer step unless the algorithm says otherwise.
        scale_free: it is the same, not yet whitened, when a number is added to all rewards or multiplies them.
    """

    per_response = False
    compares_group = False
    needs_values = False
    needs_greedy = False
    whitens = False
    scale_free = False

    def __call__(self, batch: Batch, token_rewards: Tensor) -> Tensor:
        """Advantage of every trained token.

        Args:
            batch: whole groups of one optimizer step, on the host; log-probs, rewards and masks are filled in.
            token_rewards: ``[B, T]``: the penalty of a KL in the reward, and the response's reward on its last token.

        Returns:
            ``[B, T]`` or ``[B, 1]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__().")


class _GroupAdvantage(Advantage):
    """Compares a response's whole reward, KL penalty included, with its group's."""

    per_response = compares_group = True

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, Tensor], Tensor],
        whitens: bool = False,
        scale_free: bool = False,
    ) -> None:
        self.function, self.whitens, self.scale_free = function, whitens, scale_free

    def __call__(self, batch: Batch, token_rewards: Tensor) -> Tensor:
        valid = batch.response_mask.any(-1)
        return self.function(token_rewards.sum(-1), batch.group_ids, valid)[:, None]


class _RewardsToGo(Advantage):
    """Reward-to-go; for ReMax (arXiv 2310.10505) minus the reward of the greedy response to the prompt."""

    def __init__(self, gamma: float, minus_greedy: bool = False, whitens: bool = False) -> None:
        self.gamma, self.needs_greedy, self.whitens = gamma, minus_greedy, whitens

    def __call__(self, batch: Batch, token_rewards: Tensor) -> Tensor:
        to_go = rewards_to_go(token_rewards, batch.response_mask, self.gamma)
        return to_go - batch.greedy_rewards[:, None] if self.needs_greedy else to_go


class _GAE(Advantage):
    needs_values = whitens = True

    def __init__(self, gamma: float, gae_lambda: float) -> None:
        self.gamma, self.gae_lambda = gamma, gae_lambda

    def __call__(self, batch: Batch, token_rewards: Tensor) -> Tensor:
        return gae(token_rewards, batch.values_old, batch.response_mask, self.gamma, self.gae_lambda)[0]


AdvantageName = Literal[
    "gae",
    "group_norm",
    "group_mean",
    "rloo",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "cpgd",
]
DISCOUNTED = ("gae", "reinforce", "remax")
"""Names of the advantages that a discount changes."""


def named_advantage(name: str, gamma: float, gae_lambda: float, std_epsilon: float) -> Advantage:
    """The advantage of that name (one of :data:`AdvantageName`), with the options that it has."""
    named: dict[str, Advantage] = {
        "gae": _GAE(gamma, gae_lambda),
        "group_norm": _GroupAdvantage(partial(group_norm, epsilon=std_epsilon), scale_free=True),
        "group_mean": _GroupAdvantage(group_mean),
        "rloo": _GroupAdvantage(rloo),
        "reinforce": _RewardsToGo(gamma),
        "reinforce_plus_plus": _RewardsToGo(1.0, whitens=True),
        "reinforce_plus_plus_baseline": _GroupAdvantage(group_mean, whitens=True),
        "remax": _RewardsToGo(gamma, minus_greedy=True),
        "cpgd": _GroupAdvantage(group_mean),
    }
    return named[name]
