"""``best.json``: which checkpoint of a folder is best, and by what."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

NAME = "best.json"


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far.

    Attributes:
        folder: its path.
        monitor: the metric.
        mode: whether the largest or the smallest value is best.
        value: what the metric was.
    """

    folder: str
    monitor: str
    mode: Literal["min", "max"]
    value: float

    def beats(self, other: Best | None) -> bool:
        """Whether this one takes the other's place: not a number never does, and of equals the earlier one stays."""
        if math.isnan(self.value):
            return False
        if other is None or (other.monitor, other.mode) != (self.monitor, self.mode):
            return True
        return self.value > other.value if self.mode == "max" else self.value < other.value

    def write(self, place: Path) -> None:
        """Name it in ``place``, by the way from there: all at once, or not at all."""
        partial = place / f".{NAME}"
        named = asdict(self) | {"folder": os.path.relpath(self.folder, place)}
        partial.write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")
        partial.replace(place / NAME)


def best_in(file: Path) -> Path | None:
    """The checkpoint that a ``best.json`` names, if it is there."""
    try:
        folder = file.parent / str(json.loads(file.read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if folder.is_dir() else None
