"""Validation measures when it says, the same at equal weights, and leaves the training as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer import tiny_run

from lightrft.callback import RFTCallback
from lightrft.callbacks import TrajectoryWriter, Validation, WeightSync
from lightrft.data import PromptData, Source


def validated(inputs: Path, root: Path, *callbacks: RFTCallback, lr: float = 1e-2, **options: Any) -> dict[int, Any]:
    usual = [tiny_run.sampler(), WeightSync(), *callbacks]
    trainer = tiny_run.fit(inputs, root, usual=usual, model=tiny_run.module(inputs, lr=lr), **options)
    rows = tiny_run.rows(trainer.log_dir)
    return {
        step: {k: v for k, v in row.items() if k.startswith("val/")}
        for step, row in rows.items()
        if "val/reward/mean" in row
    }


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_iterations": 2}, {0, 2, 4, 5}),
        ({"every_n_iterations": 3, "at_start": False}, {3, 5}),
        ({"every_n_iterations": 100, "at_start": False}, {5}),
    ],
)
def test_it_measures_at_the_start_every_n_iterations_and_after_the_last(
    inputs: Path, tmp_path: Path, options: dict[str, Any], steps: set[int]
) -> None:
    assert set(validated(inputs, tmp_path, Validation(**options), max_iterations=5)) == steps


def test_equal_weights_give_equal_numbers_and_others_differ(inputs: Path, tmp_path: Path) -> None:
    def rows(lr: float) -> dict[int, Any]:
        sampled = Validation(every_n_iterations=1, samples_per_prompt=4, temperature=1.0)
        return validated(inputs, tmp_path / str(lr), sampled, lr=lr, max_iterations=2)

    still, moving = rows(0.0), rows(1e-1)
    assert still[0] == still[1] == still[2]
    assert still[0] == moving[0] != moving[2]


def test_a_run_trains_bit_by_bit_as_one_without_validation(inputs: Path, tmp_path: Path) -> None:
    sampled = Validation(every_n_iterations=1, samples_per_prompt=2, temperature=1.0)
    states, rows = [], []
    for name, more in {"with": [sampled], "without": []}.items():
        usual = [tiny_run.sampler(), WeightSync(), *more, tiny_run.checkpoints()]
        trainer = tiny_run.fit(inputs, tmp_path / name, usual=usual)
        folder = trainer.checkpoint_callback.last_checkpoint  # type: ignore[union-attr]
        assert folder is not None
        state = [tiny_run.saved_state(folder), torch.load(folder / "rank-0.pt", weights_only=True)]
        for part in ("callbacks", "metrics"):
            del state[1][part]
        states.append(state)
        table = {step: row for step, row in tiny_run.rows(trainer.log_dir).items() if step}
        rows.append(
            {s: {k: v for k, v in r.items() if not k.startswith(("val/", "weight_sync/"))} for s, r in table.items()}
        )
    assert tiny_run.differences(*states) == []
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_only_the_validation_prompts_are_answered_greedily_and_only_so_many(inputs: Path, tmp_path: Path) -> None:
    usual = [tiny_run.sampler(), WeightSync(), Validation(), TrajectoryWriter(token_ids=True)]
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual, limit_val_prompts=4, max_iterations=1)
    lines = [json.loads(line) for line in tiny_run.trajectories(trainer.log_dir)["val-000000-rank0.jsonl"].splitlines()]
    assert [line["prompt"] for line in lines] == [f"5+{b}=" for b in range(4)]
    assert all(set(line["log_probs"]) == {0.0} for line in lines)


def test_the_means_are_over_the_responses_that_were_written(inputs: Path, tmp_path: Path) -> None:
    usual = [tiny_run.sampler(), WeightSync(), Validation(samples_per_prompt=3, temperature=1.0), TrajectoryWriter()]
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual, max_iterations=1)
    lines = [json.loads(line) for line in tiny_run.trajectories(trainer.log_dir)["val-000001-rank0.jsonl"].splitlines()]
    row = tiny_run.rows(trainer.log_dir)[1]
    assert len(lines) == 6 * 3
    assert float(row["val/reward/mean"]) == pytest.approx(sum(line["reward"] for line in lines) / 18)
    assert float(row["val/response_tokens/mean"]) == pytest.approx(sum(line["response_tokens"] for line in lines) / 18)


def test_first_and_last_of_the_run_survive_a_resume(inputs: Path, tmp_path: Path) -> None:
    whole = Validation(every_n_iterations=1)
    validated(inputs, tmp_path / "whole", whole, max_iterations=2)
    parts = [Validation(every_n_iterations=1), Validation(every_n_iterations=1)]
    validated(inputs, tmp_path / "parts", parts[0], tiny_run.checkpoints(), max_iterations=1)
    validated(inputs, tmp_path / "parts", parts[1], max_iterations=2, ckpt_path="last")
    assert (parts[1].first, parts[1].last) == (whole.first, whole.last) and whole.first != whole.last


# What is refused


def test_without_validation_prompts_it_is_refused_before_training(inputs: Path, tmp_path: Path) -> None:
    trainer = tiny_run.trainer(tmp_path, usual=[tiny_run.sampler(), WeightSync(), Validation(at_start=False)])
    data = PromptData(train=[Source(path=str(inputs / "train.jsonl"))])
    with pytest.raises(ValueError, match=r"data\.val names no source"):
        trainer.fit(tiny_run.module(inputs), data)
    assert not (Path(trainer.log_dir) / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples_per_prompt": 2}, "2 greedy samples of a prompt are equal"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"every_n_iterations": 0}, "every_n_iterations"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_numbers_without_meaning_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Validation(**options)


def test_validate_alone_refuses_equal_samples_too(inputs: Path, tmp_path: Path) -> None:
    trainer = tiny_run.trainer(tmp_path)
    with pytest.raises(ValueError, match="2 greedy samples of a prompt are equal"):
        trainer.validate(tiny_run.module(inputs), tiny_run.data(inputs), samples_per_prompt=2)
