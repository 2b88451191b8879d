"""A rank that dies, fails or hangs ends the job: every rank left says which one, in what phase and collective."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from trainer import tiny_run

from lightrft.callback import RFTCallback
from lightrft.callbacks import WeightSync
from lightrft.verdicts import Report, sentence, to_blame
from lightrft.watchdog import Watchdog
from lightrft.whereabouts import mark

TIMEOUT = 12.0  # seconds; what a rank imports at its first step took 5 on a busy machine
HOOKS = {"rollout": "on_rollout_end", "score": "on_score_end", "update": "on_update_start"}


def die(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_a_child(fifo: Path, trainer: Any) -> None:
    """The forked child lives until the other end of the fifo is opened."""
    if os.fork() == 0:
        fifo.read_bytes()
        os._exit(0)
    die(trainer)


def hang(*_: Any) -> None:
    threading.Event().wait()


def hang_with_a_worker(trainer: Any) -> None:
    worker = multiprocessing.get_context("fork").Process(target=hang)
    worker.start()
    print(f"worker {worker.pid}", file=sys.stderr, flush=True)
    hang()


def hang_in_the_forward(trainer: Any) -> None:
    trainer.learner.actor.module.register_forward_pre_hook(hang)


def freeze(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(trainer: Any) -> None:
    raise ValueError("no such luck")


def work_long(trainer: Any) -> None:
    """Longer than the timeout, never without a mark for as long."""
    group = torch.distributed.group.WORLD
    assert group is not None and group._get_backend(torch.device("cpu")).options._timeout == timedelta(days=1)
    end = time.monotonic() + 1.5 * TIMEOUT
    while time.monotonic() < end:
        mark()


class Trouble(RFTCallback):
    """Does something in one phase of the second iteration on one rank."""

    def __init__(self, what: Callable[[Any], None], phase: str, rank: int | None) -> None:
        self.what, self.hook, self.rank = what, HOOKS[phase], rank

    def _at(self, hook: str, trainer: Any) -> None:
        if hook == self.hook and trainer.progress.iteration == 1 and self.rank in (None, trainer.fabric.global_rank):
            self.what(trainer)

    def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        self._at("on_rollout_end", trainer)

    def on_score_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        self._at("on_score_end", trainer)

    def on_update_start(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        self._at("on_update_start", trainer)


@dataclass
class Ended:
    """How a process ended, and what it wrote to its standard error."""

    code: int | None
    errors: str

    @property
    def messages(self) -> list[str]:
        return re.findall(r"^\[rank \d+\] (?!The main thread)(.*)$", self.errors, re.M)


class Job:
    """A run of two iterations with trouble, each rank a process."""

    def __init__(self, inputs: Path, root: Path, size: int, trouble: Trouble, **options: Any) -> None:
        root.mkdir(parents=True)
        self.files = [root / f"errors-{rank}" for rank in range(size)]
        port = ranks.free_port()
        options |= {"usual": [tiny_run.sampler(), WeightSync()], "callbacks": [trouble], "devices": size}
        self.processes = [
            ranks.CONTEXT.Process(target=_rank, args=(rank, size, port, self.files[rank], inputs, root, options))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def end(self, frozen: int | None = None) -> list[Ended]:
        """Of each rank; one that is still there after a generous time is stuck, and has no exit code."""
        for rank, process in enumerate(self.processes):
            if rank != frozen:
                process.join(20 * TIMEOUT)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return [Ended(code, file.read_text()) for code, file in zip(codes, self.files)]


def _rank(rank: int, size: int, port: int, errors: Path, inputs: Path, root: Path, options: dict[str, Any]) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    ranks.become(rank, size, port)
    sizes = {"max_iterations": 2, "prompts_per_iteration": 6, "responses_per_update": 24}
    tiny_run.fit(inputs, root, timeout_seconds=TIMEOUT, **sizes, **options)


@pytest.mark.parametrize(("phase", "rank"), [("rollout", 1), ("score", 1), ("update", 1), ("score", 0)])
def test_a_rank_that_is_killed(inputs: Path, tmp_path: Path, phase: str, rank: int) -> None:
    ends = Job(inputs, tmp_path / "run", 3, Trouble(die, phase, rank)).end()
    assert ends[rank].code == -signal.SIGKILL
    for end in (end for number, end in enumerate(ends) if number != rank):
        (message,) = end.messages
        assert end.code == 1
        assert re.match(rf"Rank {rank} \(process \d+ on \S+\) died, .* phase `{phase}`, iteration 2[;. ]", message)


@pytest.fixture(scope="module")
def ended(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    """Ends of the runs in which somebody waits, by what happens in them; they wait at the same time."""
    cases = {
        "rollout": Trouble(hang, "rollout", 1),
        "score": Trouble(hang_with_a_worker, "score", 0),
        "update": Trouble(hang, "update", 1),
        "forward": Trouble(hang_in_the_forward, "update", 1),
        "failure": Trouble(fail, "update", 1),
        "slow": Trouble(work_long, "score", 1),
    }
    root = tmp_path_factory.mktemp("ended")
    jobs = {name: Job(inputs, root / name, 2, trouble, strategy="fsdp2") for name, trouble in cases.items()}
    frozen = Job(inputs, root / "frozen", 2, Trouble(freeze, "score", 0))
    return {name: job.end() for name, job in jobs.items()} | {"frozen": frozen.end(frozen=0)}


# Fabric's all_reduce begins with a barrier.
@pytest.mark.parametrize(
    ("phase", "rank", "waits_in"),
    [
        ("rollout", 1, r"`barrier #\d+`, phase `rollout`, iteration 2 \(agreeing on a stop\)"),
        ("score", 0, r"`barrier #\d+`, phase `score`, iteration 2 \(agreeing on a stop\)"),
        ("update", 1, r"`barrier #\d+`, phase `update`, iteration 2\."),
    ],
)
def test_a_rank_that_hangs(ended: dict[str, list[Ended]], phase: str, rank: int, waits_in: str) -> None:
    for number, end in enumerate(ended[phase]):
        (message,) = end.messages
        assert end.code == 1
        assert re.match(rf"Rank {rank} \(.*\) hangs, .* phase `{phase}`, iteration 2 \(Trouble.on_", message)
        assert re.search(rf"; rank {1 - rank} is in collective {waits_in}", message), message
        assert ("in hang" in end.errors) == (number == rank)  # where it stands


def test_a_rank_that_hangs_inside_a_forward(ended: dict[str, list[Ended]]) -> None:
    place = r"phase `update`, iteration 2 \(forward and backward of the actor, micro-batch 1 of \d+\)"
    for end in ended["forward"]:
        (message,) = end.messages
        assert re.match(rf"Rank 1 \(.*\) hangs, .*, {place}; rank 0 is in collective `\w+ #\d+`, {place}", message), (
            message
        )


def test_the_workers_of_a_rank_that_is_ended_are_ended(ended: dict[str, list[Ended]]) -> None:
    started = re.search(r"^worker (\d+)$", ended["score"][0].errors, re.M)
    assert started is not None
    with pytest.raises(ProcessLookupError):
        os.kill(int(started[1]), 0)


def test_a_rank_0_that_does_not_answer(ended: dict[str, list[Ended]]) -> None:
    end = ended["frozen"][1]
    (message,) = end.messages
    assert end.code == 1
    assert re.match(r"Rank 0 \(.*\) does not answer, without .* phase `score`, iteration 2.*; rank 1 ", message)


def test_a_forked_child_does_not_hide_the_death_of_its_rank(inputs: Path, tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    ends = Job(inputs, tmp_path / "run", 2, Trouble(partial(die_before_a_child, fifo), "update", 1)).end()
    fifo.write_bytes(b"")  # lets the child go
    (message,) = ends[0].messages
    assert re.match(r"Rank 1 \(.*\) died, .* phase `update`", message)


def test_a_rank_that_fails_alone(ended: dict[str, list[Ended]]) -> None:
    ends = ended["failure"]
    (message,) = ends[0].messages
    assert re.match(r"Rank 1 \(.*\) failed with ValueError: no such luck, phase `update`, iteration 2 ", message)
    assert [end.code for end in ends] == [1, 1]
    assert not ends[1].messages and "ValueError: no such luck" in ends[1].errors


def test_ranks_that_fail_alike_say_so_themselves(inputs: Path, tmp_path: Path) -> None:
    for end in Job(inputs, tmp_path / "run", 2, Trouble(fail, "update", None)).end():
        assert end.code == 1 and not end.messages and "ValueError: no such luck" in end.errors


def test_a_slow_rank_that_makes_progress_is_waited_for(ended: dict[str, list[Ended]]) -> None:
    assert [(end.code, end.messages) for end in ended["slow"]] == [(0, []), (0, [])], ended["slow"][0].errors


# --- who is to blame -------------------------------------------------------------------------------------------------


def moving(rank: int) -> Report:
    return Report(rank, "p", "update", 3, "step", idle=1.0)


def waiting(rank: int) -> Report:
    return Report(rank, "p", "update", 3, "step", idle=20.0, collective="all_reduce #7", may_wait=True)


def stuck(rank: int, **options: Any) -> Report:
    return Report(rank, "p", "score", 3, "a reward", idle=20.0, **options)


@pytest.mark.parametrize(
    ("reports", "blamed"),
    [
        ([moving(0), moving(1)], []),
        ([waiting(0), moving(1)], []),
        ([waiting(0), stuck(1)], [1]),
        ([moving(0), stuck(1), stuck(2)], [1, 2]),
        ([waiting(0), waiting(1)], [0, 1]),
        ([waiting(0), stuck(1, may_wait=True, answers=False)], [1]),
        ([moving(0), stuck(1, died=True), stuck(2, error="broken pipe")], [1]),
        ([waiting(0), stuck(1, error="no luck")], [1]),
        ([stuck(0, error="no luck"), stuck(1, error="no luck")], []),
    ],
)
def test_who_is_to_blame(reports: list[Report], blamed: list[int]) -> None:
    assert [one.rank for one in to_blame(reports, timeout=10.0)] == blamed


def test_ranks_that_wait_for_each_other_are_told_apart() -> None:
    reports = [waiting(0), waiting(1), waiting(2)]
    reports[1].collective = "barrier #7"
    assert sentence(reports, reports, 10.0) == (
        "No rank has made progress for 10 s: they wait for each other; ranks 0, 2 are in collective `all_reduce #7`, "
        "phase `update`, iteration 3 (step); rank 1 is in collective `barrier #7`, phase `update`, iteration 3 (step). "
        "The job ends."
    )


def test_a_time_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.timeout_seconds is 0; it must be above 0, or null"):
        Watchdog(0)
