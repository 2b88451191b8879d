"""Recipes: which rewards, weighted how, score the responses of a label."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightrft.rewards.base import Reward
from lightrft.rewards.math_accuracy import MathAccuracy
from lightrft.rewards.rules import BoxedFormat, ExactMatch


@dataclass
class Component:
    """One reward of a recipe.

    Args:
        reward: what scores.
        weight: factor of its score in the sum that trains; may be negative. 0 only logs it.
        name: its name in ``reward_parts`` and the metrics; the class name in snake_case by default.

    Raises:
        ValueError: a weight that is not finite, or an empty name.
    """

    reward: Reward
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"The weight of {self.metric_name} is {self.weight!r}; it must be a finite number.")
        if self.name is not None and not self.name.strip():
            raise ValueError(f"The name of a {type(self.reward).__name__} component is empty; leave it out instead.")

    @property
    def metric_name(self) -> str:
        if self.name is not None:
            return self.name
        words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
        return re.sub(words, "_", type(self.reward).__name__).lower()


def check_recipe(label: str, components: Sequence[Component]) -> None:
    """Raise ``ValueError`` where a recipe is empty or two of its components share a name."""
    if not components:
        raise ValueError(f"The reward recipe {label!r} is empty; give it at least one component.")
    names = [component.metric_name for component in components]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"The reward recipe {label!r} has two components called {name!r}; set their `name`.")


def _boxed_math() -> list[Component]:
    return [Component(MathAccuracy(), 0.9), Component(BoxedFormat(), 0.1)]


BUILT_IN: dict[str, Callable[[], list[Component]]] = {
    "gsm8k_rule": _boxed_math,
    "geo3k_rule": _boxed_math,
    "exact_match": lambda: [Component(ExactMatch())],
}
"""Built when a label asks for it: a run that does not use math-verify does not need it installed."""
