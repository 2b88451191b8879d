"""The control: every response gets the reward of a response to another prompt, so nothing can be learnt from it."""

from __future__ import annotations

from typing import Any

from lightrft.callback import RFTCallback
from lightrft.samples import Rollout


class PermutedRewards(RFTCallback):
    """Rotates rewards by one prompt before advantages are computed; validation keeps its own."""

    def on_score_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
        rewards = [[response.reward for response in group] for group in rollout.groups]
        for group, others in zip(rollout.groups, rewards[1:] + rewards[:1]):
            for response, reward in zip(group, others):
                response.reward = reward
