"""Rewards: rules and functions that score responses, recipes of them, and the scorer of a rollout."""

from lightrft.rewards.base import Reward, RewardInput
from lightrft.rewards.function import FunctionReward
from lightrft.rewards.math_accuracy import MathAccuracy
from lightrft.rewards.recipes import Component
from lightrft.rewards.rules import BoxedFormat, ExactMatch, ThinkFormat
from lightrft.rewards.scorer import RewardError, Scorer

__all__ = [
    "BoxedFormat",
    "Component",
    "ExactMatch",
    "FunctionReward",
    "MathAccuracy",
    "Reward",
    "RewardError",
    "RewardInput",
    "Scorer",
    "ThinkFormat",
]
