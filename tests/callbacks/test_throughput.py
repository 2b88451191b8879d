"""Seconds, tokens per second and peak memory of every phase are in the metrics, and add up."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer import tiny_run

from lightrft.callback import RFTCallback
from lightrft.callbacks import Throughput, WeightSync

PHASES = ("rollout", "score", "advantages", "update")


def all_rows(log_dir: str) -> list[dict[str, float]]:
    with (Path(log_dir) / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_every_phase_has_seconds_and_memory_and_the_rates_follow_from_them(inputs: Path, tmp_path: Path) -> None:
    trained: list[int] = []

    class Watch(RFTCallback):
        def on_update_start(self, trainer: Any, pl_module: Any, batch: Any) -> None:
            trained[-1] += sum(batch.sequence_lengths)

        def on_iteration_start(self, trainer: Any, pl_module: Any) -> None:
            trained.append(0)

    throughput = Throughput()
    trainer = tiny_run.fit(inputs, tmp_path, usual=[tiny_run.sampler(), WeightSync(), throughput, Watch()])
    rows = all_rows(trainer.log_dir)
    assert len(rows) == 3
    for row, prompt_and_response_tokens in zip(rows, trained):
        seconds = {phase: row[f"time/{phase}_seconds"] for phase in PHASES}
        assert all(value > 0 for value in seconds.values())
        assert all(row[f"memory/{phase}_peak_gib"] > 0 for phase in PHASES)
        sampled = row["response_tokens/mean"] * 16
        total = sum(seconds.values())
        assert row["throughput/tokens_per_second"] == pytest.approx(sampled / total)
        assert row["throughput/rollout_tokens_per_second"] == pytest.approx(sampled / row["time/sampling_seconds"])
        assert 0 < row["time/sampling_seconds"] <= seconds["rollout"]
        assert row["throughput/update_tokens_per_second"] == pytest.approx(
            prompt_and_response_tokens / seconds["update"]
        )
    assert throughput.seconds == pytest.approx(sum(row[f"time/{phase}_seconds"] for row in rows for phase in PHASES))
    assert throughput.tokens == pytest.approx(sum(row["response_tokens/mean"] * 16 for row in rows))


def test_the_sums_go_on_after_a_resume(inputs: Path, tmp_path: Path) -> None:
    first = Throughput()
    tiny_run.fit(
        inputs,
        tmp_path,
        usual=[tiny_run.sampler(), WeightSync(), first, tiny_run.checkpoints()],
        max_iterations=1,
    )
    second = Throughput()
    usual = [tiny_run.sampler(), WeightSync(), second]
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual, max_iterations=2, ckpt_path="last")
    (row,) = all_rows(trainer.log_dir)
    assert second.tokens == pytest.approx(first.tokens + row["response_tokens/mean"] * 16)
    assert second.seconds == pytest.approx(first.seconds + sum(row[f"time/{phase}_seconds"] for phase in PHASES))


def test_a_peak_is_that_of_its_phase(inputs: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset a process's peak memory")

    class Hungry(RFTCallback):
        def on_score_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
            torch.ones(2**26).sum()  # a quarter GiB, touched and freed

    trainer = tiny_run.fit(inputs, tmp_path, [Hungry()], max_iterations=1)
    row = all_rows(trainer.log_dir)[-1]
    assert row["memory/score_peak_gib"] > row["memory/rollout_peak_gib"] + 0.2
    assert row["memory/update_peak_gib"] < row["memory/score_peak_gib"] - 0.2
