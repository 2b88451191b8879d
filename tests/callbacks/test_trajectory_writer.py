"""What was asked, answered and rewarded can be read back from the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer import tiny_run

from lightrft.callback import RFTCallback
from lightrft.callbacks import TrajectoryWriter, Validation, WeightSync
from lightrft.samples import Rollout


def lines_of(log_dir: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tiny_run.trajectories(log_dir)[name].splitlines()]


def test_a_line_holds_the_response_as_it_was_sampled_and_scored(inputs: Path, tmp_path: Path) -> None:
    rollouts: list[Rollout] = []

    class Keep(RFTCallback):
        def on_score_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
            rollouts.append(rollout)

    usual = [tiny_run.sampler(), WeightSync(), Keep(), TrajectoryWriter(token_ids=True)]
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual, max_iterations=2)
    lines = lines_of(trainer.log_dir, "train-000002-rank0.jsonl")
    assert len(lines) == 16
    for line, (prompt, response) in zip(lines, rollouts[1]):
        assert line == {
            "uid": prompt.uid,
            "source": "train",
            "label": "exact_match",
            "prompt": prompt.text,
            "response": response.text,
            "reference": prompt.reference,
            "reward": response.reward,
            "reward_parts": {"shortness": response.reward},
            "finish_reason": response.finish_reason,
            "response_tokens": len(response.token_ids),
            "dropped": False,
            "weight_version": 2,  # after the first iteration's two updates
            "token_ids": response.token_ids.tolist(),
            "log_probs": response.log_probs.tolist(),
        }
    row = tiny_run.rows(trainer.log_dir)[2]
    assert float(row["reward/mean"]) == pytest.approx(sum(line["reward"] for line in lines) / 16)


def test_how_often_is_the_users_choice(inputs: Path, tmp_path: Path) -> None:
    writer = TrajectoryWriter(every_n_iterations=2)
    usual = [tiny_run.sampler(), WeightSync(), Validation(), writer]
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual)
    names = {"train-000001-rank0.jsonl", "train-000003-rank0.jsonl", "val-000000-rank0.jsonl", "val-000003-rank0.jsonl"}
    written = tiny_run.trajectories(trainer.log_dir)
    assert set(written) == names
    lines = [json.loads(line) for text in written.values() for line in text.splitlines()]
    assert len(lines) == 2 * 16 + 2 * 6 and not any("token_ids" in line or "log_probs" in line for line in lines)


def test_what_a_model_writes_cannot_break_a_line(inputs: Path, tmp_path: Path) -> None:
    hostile = 'line\nbreak \u2028 \x00 \ud800 "quote" {}'

    class Crafted(RFTCallback):
        def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
            for _, response in rollout:
                response.text = hostile

    trainer = tiny_run.fit(inputs, tmp_path, [Crafted()], max_iterations=1)
    lines = lines_of(trainer.log_dir, "train-000001-rank0.jsonl")
    assert [line["response"] for line in lines] == [hostile] * 16


def test_a_number_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TrajectoryWriter(every_n_iterations=0)
