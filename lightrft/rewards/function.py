"""A user's own function as a reward."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lightrft.rewards.base import Reward, RewardInput


class FunctionReward(Reward):
    """The score a function gives: ``def reward(item: RewardInput) -> float | None``.

    Args:
        function: dotted path ``package.module.name``, or the function itself (in a notebook).

    Raises:
        ValueError: the path leads to nothing that can be called; says why.
    """

    def __init__(self, function: str | Callable[[RewardInput], float | None]) -> None:
        self.function = function
        self._call = _find(function) if isinstance(function, str) else function
        if not callable(self._call):
            raise ValueError(f"function {function!r} is a {type(self._call).__name__}; a reward must be a function.")

    def score(self, item: RewardInput) -> float | None:
        return self._call(item)


def _find(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"function {path!r} is not a dotted path; write it as package.module.name.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is read
        raise ValueError(
            f"function {path!r}: importing {module_name!r} raised {type(error).__name__}: {error}; "
            "is its folder on PYTHONPATH?"
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"function {path!r}: {module_name!r} has nothing called {name!r}; check its spelling.")
    return getattr(module, name)
