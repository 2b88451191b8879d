"""An advantage and a policy loss that LightRFT does not have; ``config.yaml`` selects them by ``class_path``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrft.algorithms import Advantage, Objective, log_ratio
from lightrft.samples import Batch


class QuantileAdvantage(Advantage):
    """Reward minus a quantile of its group's rewards (arXiv 2509.22611, without its division by the std).

    With rewards of 0 and 1 the baseline is one of the two: where a prompt is mostly failed only the right answers
    count, where it is mostly solved only the wrong ones.

    Args:
        quantile: in [0, 1]; the baseline is the largest reward of the group that is at or below it.

    Raises:
        ValueError: outside [0, 1].
    """

    per_response = compares_group = True

    def __init__(self, quantile: float = 0.4) -> None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"QuantileAdvantage's quantile is {quantile}; it must be in [0, 1].")
        self.quantile = quantile

    def __call__(self, batch: Batch, token_rewards: Tensor) -> Tensor:
        rewards, valid = token_rewards.sum(-1), batch.response_mask.any(-1)
        baselines = torch.zeros_like(rewards)
        for group in batch.group_ids[valid].unique():
            members = (batch.group_ids == group) & valid
            baselines[members] = rewards[members].quantile(self.quantile, interpolation="lower")
        return (rewards - baselines)[:, None]

    def __repr__(self) -> str:
        """What the run's first lines show."""
        return f"QuantileAdvantage(quantile={self.quantile})"


class SoftClip(Objective):
    """``-(4 / tau) sigmoid(tau (ratio - 1)) A``: PPO's loss with a bound that is soft (arXiv 2511.20347).

    At a ratio of 1 the gradient is that of ``-ratio A``; away from it, on either side, it fades instead of stopping.

    Args:
        tau_positive: how fast it fades where the advantage is positive.
        tau_negative: where it is negative.

    Raises:
        ValueError: not above 0.
    """

    def __init__(self, tau_positive: float = 1.0, tau_negative: float = 1.05) -> None:
        if not (tau_positive > 0 and tau_negative > 0):
            raise ValueError(f"SoftClip's taus are {tau_positive} and {tau_negative}; both must be above 0.")
        self.tau_positive, self.tau_negative = tau_positive, tau_negative

    def __call__(self, log_probs: Tensor, batch: Batch) -> Tensor:
        ratio = log_ratio(log_probs, batch.log_probs_old).exp()
        tau = torch.where(batch.advantages > 0, self.tau_positive, self.tau_negative)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * batch.advantages

    def __repr__(self) -> str:
        return f"SoftClip(tau_positive={self.tau_positive}, tau_negative={self.tau_negative})"
