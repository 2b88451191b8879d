"""What a scored rollout says about itself."""

from __future__ import annotations

import torch

from lightrft.algorithms import has_spread
from lightrft.analysis.metrics import Metrics
from lightrft.samples import Response, Rollout


def add_rollout_metrics(metrics: Metrics, rollout: Rollout, prefix: str = "") -> None:
    """Rewards by part (mean, and std over all responses), lengths, truncated and dropped fractions, spreadless groups.

    Args:
        metrics: where they go.
        rollout: scored.
        prefix: put before every name, e.g. ``val/``.
    """
    responses = [response for _, response in rollout]
    lengths = [len(response.token_ids) for response in responses]
    metrics.mean(f"{prefix}response_tokens/mean", torch.tensor(lengths))
    metrics.maximum(f"{prefix}response_tokens/max", torch.tensor(lengths))
    truncated = [response.finish_reason == "length" for response in responses]
    metrics.mean(f"{prefix}truncated_fraction", torch.tensor(truncated))
    metrics.mean(f"{prefix}dropped_fraction", torch.tensor([response.dropped for response in responses]))
    for part, values in _rewards_by_part(responses).items():
        metrics.mean_and_std(
            f"{prefix}reward/{part}" if part else f"{prefix}reward", torch.tensor(values, dtype=torch.float64)
        )
    spread = torch.tensor(groups_with_spread(rollout), dtype=torch.float64)
    metrics.mean(f"{prefix}groups_without_spread", 1.0 - spread)
    if rollout.greedy:
        greedy = [response.reward for response in rollout.greedy if response.reward is not None]
        metrics.mean(f"{prefix}reward/greedy/mean", torch.tensor(greedy, dtype=torch.float64))


def groups_with_spread(rollout: Rollout) -> list[bool]:
    """Whether the rewards of each group, in float32 as they train, are not all equal."""
    responses = [response for _, response in rollout]
    rewards = torch.tensor([response.reward or 0.0 for response in responses], dtype=torch.float32)
    groups = torch.tensor([number for number, group in enumerate(rollout.groups) for _ in group], dtype=torch.int64)
    valid = torch.tensor([not response.dropped for response in responses], dtype=torch.bool)
    differ = set(groups[has_spread(rewards, groups, valid)].tolist())
    return [number in differ for number in range(len(rollout.groups))]


def _rewards_by_part(responses: list[Response]) -> dict[str, list[float]]:
    """Scores of each component, and under ``""`` the reward that trains."""
    parts: dict[str, list[float]] = {}
    for response in responses:
        if response.reward is not None and not response.dropped:
            parts.setdefault("", []).append(response.reward)
        for part, value in response.reward_parts.items():
            parts.setdefault(part, []).append(value)
    return parts
