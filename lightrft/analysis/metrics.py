"""Means, standard deviations and maxima over responses or tokens, over all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightrft.ops.collectives import everyone
from lightrft.ops.moments import Moments


class Metrics:
    """Named statistics, each over whatever was added on any rank. Ranks may add different names.

    What is computed of a name's values is in what it was added as: ``mean``, ``mean_and_std``, ``maximum``.
    """

    def __init__(self) -> None:
        self._moments: dict[tuple[str, str], Moments] = {}

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
        new = Moments.of(torch.as_tensor(values, dtype=torch.float64))
        if new.count:
            self._moments[name, statistic] = self._moments.get((name, statistic), Moments()).merged(new)

    def compute(self) -> dict[str, float]:
        """Values over all ranks, by name. Collective: every rank calls it."""
        merged: dict[tuple[str, str], Moments] = {}
        for moments in everyone(self._moments):
            for key, values in moments.items():
                merged[key] = merged.get(key, Moments()).merged(values)
        return {name: _statistic(statistic, merged[name, statistic]) for name, statistic in sorted(merged)}


def _statistic(name: str, moments: Moments) -> float:
    if name == "std":
        return math.sqrt(moments.spread / moments.count)
    return moments.largest if name == "maximum" else moments.mean
