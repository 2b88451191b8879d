"""Scores of an iteration's rollouts, and their statistics over all ranks."""

from __future__ import annotations

from lightrft.analysis import Metrics, add_rollout_metrics
from lightrft.rewards import Scorer
from lightrft.samples import Rollout
from lightrft.whereabouts import mark


class Scoring:
    """Scores rollouts, one after another, and keeps count of all of them.

    Args:
        scorer: gives the rewards.
        world_size: number of ranks.
        prefix: put before every metric's name, e.g. ``val/``.
    """

    def __init__(self, scorer: Scorer, world_size: int, prefix: str = "") -> None:
        self.scorer, self.world_size, self.prefix = scorer, world_size, prefix
        self._counts: dict[str, float] = {}
        self._metrics = Metrics()

    def score(self, rollout: Rollout) -> None:
        """Fill in every reward, in place. Without a scored greedy response to compare with, a group is dropped."""
        self._count(self.scorer.score(rollout))
        if rollout.greedy:
            alone = Rollout(rollout.prompts, [[response] for response in rollout.greedy], rollout.sampling)
            counts = self.scorer.score(alone)
            self._count({name: count for name, count in counts.items() if not name.startswith("dropped")})
            self._drop_without_baseline(rollout)
        add_rollout_metrics(self._metrics, rollout, self.prefix)

    def _drop_without_baseline(self, rollout: Rollout) -> None:
        for group, greedy in zip(rollout.groups, rollout.greedy):
            lost = [response for response in group if greedy.dropped and not response.dropped]
            self._count({"dropped_responses": float(len(lost)), "dropped_groups": float(bool(lost))})
            for response in lost:
                response.dropped = True

    def _count(self, counts: dict[str, float]) -> None:
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def compute(self) -> dict[str, float]:
        """Counters (sums over ranks) and statistics of all that was scored. Collective."""
        mark("metrics of the scored rollout")
        for name, count in self._counts.items():
            # A mean over ranks times their number is the sum over ranks.
            self._metrics.mean(f"{self.prefix}scoring/{name}", count * self.world_size)
        return self._metrics.compute()
