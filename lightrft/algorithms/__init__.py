"""Algorithms as pure functions on tensors, one file an axis, joined by :class:`Algorithm`."""

from lightrft.algorithms.advantages import ADVANTAGES, group_mean, group_norm
from lightrft.algorithms.aggregation import Aggregation, StepTotals, token_weights
from lightrft.algorithms.algorithm import PRESETS, Algorithm, resolve_algorithm
from lightrft.algorithms.kl import KL_ESTIMATORS, k1, k2, k3
from lightrft.algorithms.policy_loss import clipped_ratio_loss, log_ratio

__all__ = [
    "ADVANTAGES",
    "KL_ESTIMATORS",
    "PRESETS",
    "Aggregation",
    "Algorithm",
    "StepTotals",
    "clipped_ratio_loss",
    "group_mean",
    "group_norm",
    "k1",
    "k2",
    "k3",
    "log_ratio",
    "resolve_algorithm",
    "token_weights",
]
