"""Advantages: how much better a response was than what was expected of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _group_statistics(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean-centred rewards and their group's std (Bessel), each ``[B]``; both 0 where a group has no spread."""
    centred, std = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for group in torch.unique(group_ids):
        members = (group_ids == group) & valid
        scores = rewards[members]
        # Equality of the extremes, not a std of 0: rounding gives equal rewards a std just above it.
        if len(scores) > 1 and scores.max() > scores.min():
            centred[members] = scores - scores.mean()
            std[members] = scores.std(correction=1)
    return centred, std


def group_norm(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """``(R - mean_group) / (std_group + 1e-6)`` (GRPO, arXiv 2402.03300).

    Args:
        rewards: ``[B]``.
        group_ids: int64 ``[B]``; equal for responses to one prompt.
        valid: bool ``[B]``; responses that are trained on, the only ones that enter a group's mean.

    Returns:
        ``[B]``; exactly 0 for a group of one, for equal rewards, and where not ``valid``.
    """
    centred, std = _group_statistics(rewards, group_ids, valid)
    return centred / (std + 1e-6)


def group_mean(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> Tensor:
    """``R - mean_group`` (Dr.GRPO, arXiv 2503.20783). Arguments and result as in :func:`group_norm`."""
    return _group_statistics(rewards, group_ids, valid)[0]


ADVANTAGES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "group_norm": group_norm,
    "group_mean": group_mean,
}
GROUP_ADVANTAGES = frozenset({"group_norm", "group_mean"})
"""Those that are 0 in a group of one."""
