"""Means, standard deviations and maxima over responses or tokens, over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric, Metric

_SQUARE = "/square"


class Metrics:
    """Named statistics, each over whatever was added on any rank. Ranks may add different names."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._metrics: dict[str, Metric] = {}

    def mean(self, name: str, values: Tensor | float, weights: Tensor | float = 1.0) -> None:
        """Add values to a weighted mean."""
        self._add(name, MeanMetric, values, weights)

    def mean_and_std(self, name: str, values: Tensor) -> None:
        """Add values to ``name/mean`` and ``name/std`` (population)."""
        self.mean(f"{name}/mean", values)
        self.mean(f"{name}{_SQUARE}", values.double().square())

    def maximum(self, name: str, values: Tensor | float) -> None:
        """Add values to a maximum."""
        self._add(name, MaxMetric, values)

    def _add(self, name: str, kind: type[Metric], *values: Tensor | float) -> None:
        metric = self._metrics.setdefault(name, self._new(kind))
        tensors = [torch.as_tensor(value, dtype=torch.float64).to(self.device) for value in values]
        if tensors[0].numel():
            metric.update(*tensors)

    def _new(self, kind: type[Metric]) -> Metric:
        return kind(nan_strategy="disable").set_dtype(torch.float64).to(self.device)

    def compute(self) -> dict[str, float]:
        """Values over all ranks, by name. Collective: every rank calls it."""
        for name, kind in sorted(self._kinds_of_all_ranks().items()):
            self._metrics.setdefault(name, self._new(kind))
        # A rank that added nothing takes part in the reduction all the same.
        for metric in self._metrics.values():
            metric._update_count = max(metric._update_count, 1)
        values = {name: float(self._metrics[name].compute()) for name in sorted(self._metrics)}
        for name in [name for name in values if name.endswith(_SQUARE)]:
            stem = name.removesuffix(_SQUARE)
            variance = values.pop(name) - values[f"{stem}/mean"] ** 2
            values[f"{stem}/std"] = max(variance, 0.0) ** 0.5
        return values

    def _kinds_of_all_ranks(self) -> dict[str, type[Metric]]:
        mine = {name: type(metric) for name, metric in self._metrics.items()}
        if not dist.is_initialized():
            return mine
        everyone: list[dict[str, type[Metric]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return {name: kind for kinds in everyone for name, kind in kinds.items()}
