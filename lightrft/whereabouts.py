"""Where this process stands in a run: the marks of progress that the watch over ranks (:mod:`lightrft.watchdog`) reads.

A process is one rank, so there is one record of it. Whatever may take long marks each part that it has done: an engine
its tokens, a scorer its responses, the learner its micro-batches. Who marks nothing for ``trainer.timeout_seconds``
hangs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Whereabouts:
    """What this process does.

    Attributes:
        phase: of the loop, or ``set-up``.
        iteration: counted from 1; 0 before the first.
        doing: what was begun last inside the phase.
        since: when the last mark was made (``time.monotonic`` seconds).
    """

    phase: str = "set-up"
    iteration: int = 0
    doing: str = ""
    since: float = field(default_factory=time.monotonic)


here = Whereabouts()


def mark(doing: str | None = None) -> None:
    """A part of the work is done; ``doing`` names what comes next, where that is something else. Costs nothing."""
    here.since = time.monotonic()
    if doing is not None:
        here.doing = doing
