"""Means, standard deviations and maxima over responses or tokens, over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class _Moments:
    """Count, sum and largest of some float64 values, and the sum of their squared distances from the mean."""

    count: int = 0
    mean: float = 0.0
    spread: float = 0.0
    largest: float = -math.inf

    def merged(self, other: _Moments) -> _Moments:
        """Of both sets of values together (Chan et al. 1979, updating formulae for sample variances)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        gap = other.mean - self.mean
        return _Moments(
            count,
            self.mean + gap * other.count / count,
            self.spread + other.spread + gap * gap * self.count * other.count / count,
            max(self.largest, other.largest),
        )


class Metrics:
    """Named statistics, each over whatever was added on any rank. Ranks may add different names.

    What is computed of a name's values is in what it was added as: ``mean``, ``mean_and_std``, ``maximum``.
    """

    def __init__(self) -> None:
        self._moments: dict[tuple[str, str], _Moments] = {}

    def mean(self, name: str, values: Tensor | float) -> None:
        """Add values to a mean."""
        self._add(name, "mean", values)

    def mean_and_std(self, name: str, values: Tensor) -> None:
        """Add values to ``name/mean`` and ``name/std`` (of the population)."""
        self._add(f"{name}/mean", "mean", values)
        self._add(f"{name}/std", "std", values)

    def maximum(self, name: str, values: Tensor | float) -> None:
        """Add values to a maximum."""
        self._add(name, "maximum", values)

    def _add(self, name: str, statistic: str, values: Tensor | float) -> None:
        flat = torch.as_tensor(values, dtype=torch.float64).flatten()
        if not len(flat):
            return
        mean = float(flat.mean())
        new = _Moments(len(flat), mean, float((flat - mean).square().sum()), float(flat.max()))
        self._moments[name, statistic] = self._moments.get((name, statistic), _Moments()).merged(new)

    def compute(self) -> dict[str, float]:
        """Values over all ranks, by name. Collective: every rank calls it."""
        everyone = [self._moments]
        if dist.is_initialized():
            everyone = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, self._moments)
        merged: dict[tuple[str, str], _Moments] = {}
        for moments in everyone:
            for key, values in moments.items():
                merged[key] = merged.get(key, _Moments()).merged(values)
        return {name: _statistic(statistic, merged[name, statistic]) for name, statistic in sorted(merged)}


def _statistic(name: str, moments: _Moments) -> float:
    if name == "std":
        return math.sqrt(moments.spread / moments.count)
    return moments.largest if name == "maximum" else moments.mean
