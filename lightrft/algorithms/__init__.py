"""Algorithms as pure functions on tensors, one file an axis, joined by :class:`Algorithm`."""

from lightrft.algorithms.advantages import (
    Advantage,
    gae,
    group_mean,
    group_norm,
    has_spread,
    rewards_to_go,
    rloo,
    whiten,
)
from lightrft.algorithms.aggregation import Aggregation, StepTotals, token_weights, weighted_sum
from lightrft.algorithms.algorithm import Algorithm, resolve_algorithm
from lightrft.algorithms.corrections import correction_weights, effective_sample_size, response_weights
from lightrft.algorithms.kl import KL_ESTIMATORS, k1, k2, k3, k3_k2
from lightrft.algorithms.log_ratios import at_level, difference, log_ratio, response_mean
from lightrft.algorithms.policy_loss import (
    Objective,
    PolicyTerms,
    clipped_log_prob_loss,
    clipped_ratio_loss,
    clipped_weight_loss,
    drift,
    geometric_loss,
)
from lightrft.algorithms.presets import LIKE, PRESETS, Axes
from lightrft.algorithms.reward_shaping import normalized, overlong_penalty
from lightrft.algorithms.token_filter import top_entropy_mask
from lightrft.algorithms.value_loss import explained_variance, value_loss

__all__ = [
    "KL_ESTIMATORS",
    "LIKE",
    "PRESETS",
    "Advantage",
    "Aggregation",
    "Algorithm",
    "Axes",
    "Objective",
    "PolicyTerms",
    "StepTotals",
    "at_level",
    "clipped_log_prob_loss",
    "clipped_ratio_loss",
    "clipped_weight_loss",
    "correction_weights",
    "difference",
    "drift",
    "effective_sample_size",
    "explained_variance",
    "gae",
    "geometric_loss",
    "group_mean",
    "group_norm",
    "has_spread",
    "k1",
    "k2",
    "k3",
    "k3_k2",
    "log_ratio",
    "normalized",
    "overlong_penalty",
    "resolve_algorithm",
    "response_mean",
    "response_weights",
    "rewards_to_go",
    "rloo",
    "token_weights",
    "top_entropy_mask",
    "value_loss",
    "weighted_sum",
    "whiten",
]
