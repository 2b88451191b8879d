"""What every choice that may be a class of one's own can do."""

from __future__ import annotations

from typing import Any


class Choice:
    """Base of :class:`~lightrft.algorithms.Advantage` and :class:`~lightrft.algorithms.Objective`."""

    def state_dict(self) -> dict[str, Any]:
        """What changes during a run, the same on every rank; goes into checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""

    def __repr__(self) -> str:
        """What a run's first lines show; name your arguments in it, too."""
        return type(self).__qualname__
