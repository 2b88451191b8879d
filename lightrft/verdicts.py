"""Which rank is to blame when a job cannot go on, from what the ranks last said of themselves; in one sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass
class Report:
    """What is known of a rank.

    Attributes:
        rank: its number.
        process: where it runs, for messages.
        phase, iteration, doing: as in :class:`lightrft.whereabouts.Whereabouts`.
        idle: seconds since its last mark.
        collective: the one it waits in, as far as it says.
        may_wait: whether it waits for others, or cannot know.
        died: its process ended without a word.
        error: what it failed with, if it did.
        answers: whether it said anything within the time.
    """

    rank: int
    process: str = "not connected yet"
    phase: str = "set-up"
    iteration: int = 0
    doing: str = ""
    idle: float = 0.0
    collective: str | None = None
    may_wait: bool = False
    died: bool = False
    error: str | None = None
    answers: bool = True

    @property
    def place(self) -> str:
        iteration = f", iteration {self.iteration}" if self.iteration else ""
        return f"phase `{self.phase}`{iteration}" + (f" ({self.doing})" if self.doing else "")


def to_blame(reports: Sequence[Report], timeout: float) -> list[Report]:
    """The ranks for which the others wait in vain; empty where all is well, or where each fails by itself alike.

    A rank that does not move because it waits in a collective is not to blame, and is not ended as long as any rank
    moves. Where none does, they wait for each other, and all are.
    """
    died = [one for one in reports if one.died]
    if died:
        return died
    failed = [one for one in reports if one.error is not None]
    if failed:
        return failed if len(failed) < len(reports) else []
    stuck = [one for one in reports if one.idle > timeout]
    hanging = [one for one in stuck if not (one.may_wait and one.answers)]
    return hanging or (stuck if len(stuck) == len(reports) else [])


def sentence(reports: Sequence[Report], blamed: Sequence[Report], timeout: float) -> str:
    """What happened and where each rank is: who is to blame first, then the others by what they do."""
    if len(blamed) == len(reports) and all(one.may_wait for one in blamed):
        parts = [f"no rank has made progress for {timeout:g} s: they wait for each other"]
    else:
        parts = [f"rank {one.rank} ({one.process}) {_fate(one, timeout)}, {one.place}" for one in blamed]
    rest = blamed if parts[0].startswith("no rank") else [one for one in reports if one not in blamed]
    groups: dict[str, list[int]] = {}
    for one in rest:
        waits = f"in collective `{one.collective}`, " if one.collective else "in "
        groups.setdefault(waits + one.place, []).append(one.rank)
    parts += [f"{_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} {where}" for where, ranks in groups.items()]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}. The job ends."


def _fate(report: Report, timeout: float) -> str:
    if report.died:
        return "died, its process ended without an error (killed, or out of memory)"
    if report.error is not None:
        return f"failed with {report.error}"
    does = "hangs" if report.answers else "does not answer"
    return f"{does}, without progress for {report.idle:.0f} s (trainer.timeout_seconds={timeout:g})"


def _ranks(numbers: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-2, 4``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {shown}" if shown.isdigit() else f"ranks {shown}"
