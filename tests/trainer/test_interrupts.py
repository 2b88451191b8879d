"""Ctrl-C and SIGTERM: a checkpoint at the next boundary, its path, the signal's exit code, and nothing lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from trainer import tiny_run

from lightrft.callback import RFTCallback
from lightrft.callbacks import WeightSync
from lightrft.checkpoint import Writer

DRIVER = Path(__file__).with_name("stop_driver.py")


class Signals(RFTCallback):
    """Sends this process signals while the rollout of iteration ``iteration`` is on."""

    def __init__(self, *numbers: int, iteration: int = 1) -> None:
        self.numbers, self.iteration = numbers, iteration

    def on_rollout_start(self, trainer: Any, pl_module: Any, prompts: Any) -> None:
        if trainer.progress.iteration == self.iteration:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def test_a_signalled_process_saves_exits_with_the_signals_code_and_resumes_bit_by_bit(
    inputs: Path, tmp_path: Path
) -> None:
    signals = {signal.SIGINT: 130, signal.SIGTERM: 143}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    children = {
        number: subprocess.Popen(
            [sys.executable, str(DRIVER), str(inputs), str(tmp_path / number.name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in signals
    }
    whole = tiny_run.weights(tiny_run.fit(inputs, tmp_path / "whole"))
    for number, child in children.items():
        assert child.stdout is not None and child.stdout.readline() == "in the update\n"
        child.send_signal(number)
        _, shown = child.communicate("go on\n", timeout=60)
        assert child.returncode == signals[number], shown
        found = re.search(r"Stopped\. Resume with --ckpt_path (\S+)", shown)
        assert found is not None, shown
        folder = Path(found[1])
        assert folder.name == "iteration-000001-before-update-1"  # the update went to its end, the next did not begin
        assert os.listdir(folder.parent) == [folder.name]
        resumed = tiny_run.fit(inputs, tmp_path / number.name, ckpt_path=str(folder))
        assert tiny_run.differences(tiny_run.weights(resumed), whole) == []


def test_hooks_of_a_finished_run_do_not_fire_but_the_engine_is_closed(inputs: Path, tmp_path: Path) -> None:
    class Watch(RFTCallback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append("fit end")

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            seen.append("teardown")

    seen: list[str] = []
    sampler = tiny_run.sampler()
    with pytest.raises(SystemExit) as stopped:
        tiny_run.fit(inputs, tmp_path, usual=[sampler, WeightSync(), Watch(), Signals(signal.SIGINT)])
    assert stopped.value.code == 130 and seen == ["teardown"] and sampler.engine.weight_version == -1


def test_a_boundary_that_is_saved_already_is_not_saved_again(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(writer: Writer, folder: Path, then: Any) -> None:
        saved.append(folder.name)
        begin(writer, folder, then)

    saved: list[str] = []
    begin = Writer.begin
    monkeypatch.setattr(Writer, "begin", count)
    with pytest.raises(SystemExit):
        tiny_run.fit(inputs, tmp_path, [Signals(signal.SIGTERM, iteration=0), tiny_run.checkpoints(at="phase")])
    assert saved == ["iteration-000000-before-score-0"]


def test_a_second_ctrl_c_stops_at_once(inputs: Path, tmp_path: Path) -> None:
    trainer = tiny_run.trainer(tmp_path, [Signals(signal.SIGINT, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(tiny_run.module(inputs), tiny_run.data(inputs))
    assert (trainer.progress.iteration, trainer.progress.phase) == (1, "rollout")


def test_afterwards_the_signals_mean_what_they_meant(inputs: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit):
        tiny_run.fit(inputs, tmp_path, [Signals(signal.SIGINT, iteration=0)])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_in_another_thread_needs_no_signals(inputs: Path, tmp_path: Path) -> None:
    done: list[int] = []
    thread = threading.Thread(
        target=lambda: done.append(tiny_run.fit(inputs, tmp_path, max_iterations=1).progress.iteration)
    )
    thread.start()
    thread.join()
    assert done == [1]


def test_a_dry_run_saves_nothing_when_it_is_stopped(inputs: Path, tmp_path: Path) -> None:
    stop = [Signals(signal.SIGINT, iteration=0), tiny_run.checkpoints()]
    with pytest.raises(SystemExit):
        tiny_run.fit(inputs, tmp_path / "runs", stop, fast_dev_run=True)
    assert not (tmp_path / "runs").exists()
