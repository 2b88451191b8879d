"""A part of a tensor, where several ranks hold one tensor together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """One of equal, contiguous parts of a whole tensor along one of its dimensions.

    Args:
        whole: shape of the whole tensor.
        dim: the dimension that is cut, counted from the front.
        index: which part.
        parts: how many there are.

    Raises:
        ValueError: the dimension cannot be cut into as many equal parts.
    """

    whole: tuple[int, ...]
    dim: int
    index: int
    parts: int

    def __post_init__(self) -> None:
        if self.whole[self.dim] % self.parts:
            raise ValueError(f"{self.whole[self.dim]} elements cannot be cut into {self.parts} equal parts.")

    @property
    def length(self) -> int:
        """Of the part, along the dimension that is cut."""
        return self.whole[self.dim] // self.parts

    @property
    def start(self) -> int:
        """Where the part begins, along the dimension that is cut."""
        return self.index * self.length

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        return (*self.whole[: self.dim], self.length, *self.whole[self.dim + 1 :])

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the part of a whole tensor."""
        return tensor.narrow(self.dim, self.start, self.length)

    def positions(self, local: Tensor) -> Tensor:
        """Where elements lie in the flattened whole.

        Args:
            local: int64, where they lie in the flattened part.
        """
        row = self.length * math.prod(self.whole[self.dim + 1 :])
        # The part holds, of every `parts` rows of the whole, the one with its own index.
        return (local // row * self.parts + self.index) * row + local % row
