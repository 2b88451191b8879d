"""Numbers about a run: metrics over ranks, and what a rollout says about itself."""

from lightrft.analysis.metrics import Metrics
from lightrft.analysis.rollouts import add_rollout_metrics, groups_with_spread

__all__ = ["Metrics", "add_rollout_metrics", "groups_with_spread"]
