"""Count, mean, spread and largest of numbers, merged exactly from parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Statistics of some float64 values.

    Attributes:
        count: how many.
        mean: their mean.
        spread: sum of their squared distances from the mean.
        largest: of them.
    """

    count: int = 0
    mean: float = 0.0
    spread: float = 0.0
    largest: float = -math.inf

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of all elements of a tensor."""
        flat = values.detach().double().flatten()
        if not len(flat):
            return cls()
        mean = flat.mean()
        return cls(len(flat), float(mean), float((flat - mean).square().sum()), float(flat.max()))

    def merged(self, other: Moments) -> Moments:
        """Of both sets of values together (Chan et al. 1979, updating formulae for sample variances)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        gap = other.mean - self.mean
        return Moments(
            count,
            self.mean + gap * other.count / count,
            self.spread + other.spread + gap * gap * self.count * other.count / count,
            max(self.largest, other.largest),
        )

    def over_ranks(self, gather: Callable[[Tensor], Tensor]) -> Moments:
        """Of the values of all ranks, which ``gather`` joins. Collective."""
        numbers = torch.tensor([self.count, self.mean, self.spread, self.largest], dtype=torch.float64)
        merged = Moments()
        for count, mean, spread, largest in gather(numbers).view(-1, 4).tolist():
            merged = merged.merged(Moments(int(count), mean, spread, largest))
        return merged

    @property
    def variance(self) -> float:
        """Of the sample (Bessel's correction); 0 for fewer than two values."""
        return self.spread / (self.count - 1) if self.count > 1 else 0.0
