"""A person at the terminal sees how far a run is, and how it goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callbacks import ProgressBar, WeightSync


def test_the_bar_shows_iterations_phase_reward_kl_length_and_tokens_per_second(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_run.fit(inputs, tmp_path, [ProgressBar()])
    shown = capsys.readouterr().err
    last = [line for line in re.split(r"[\r\n]", shown) if "3/3" in line][-1]
    row = {k: float(v) for k, v in tiny_run.rows(trainer.log_dir)[3].items()}
    for name, metric in {"reward": "reward/mean", "kl": "kl/reference", "length": "response_tokens/mean"}.items():
        assert f"{name}={row[metric]:.3g}" in last
    assert re.search(r"tokens/s=\d", last)
    assert all(re.search(rf"{phase}: +\d+%", shown) for phase in ("rollout", "score", "advantages", "update"))


def test_it_works_without_throughput_and_without_a_kl(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_run.module(inputs, algorithm=Algorithm(kl="none"))
    usual = [tiny_run.sampler(), WeightSync(), ProgressBar()]
    tiny_run.fit(inputs, tmp_path, usual=usual, model=model, max_iterations=1)
    shown = capsys.readouterr().err
    assert re.search(r"1/1 .*reward=[\d.]+, length=[\d.]+\]", shown)
    assert "tokens/s=" not in shown and "kl=" not in shown


def test_a_resumed_run_begins_where_it_was(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run.fit(inputs, tmp_path, [tiny_run.checkpoints()], max_iterations=2)
    capsys.readouterr()
    tiny_run.fit(inputs, tmp_path, [ProgressBar()], ckpt_path="last")
    shown = capsys.readouterr().err
    assert "2/3" in shown and "3/3" in shown and "0/3" not in shown and "1/3" not in shown
