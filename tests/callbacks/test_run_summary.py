"""``summary.json`` says what a run achieved; what it could never say is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer import tiny_run

from lightrft.callback import RFTCallback
from lightrft.callbacks import RunSummary, Throughput, Validation, WeightSync


class OfShortness(RunSummary):
    accuracy = "reward/shortness/mean"


def test_the_file_and_the_table_hold_the_runs_numbers(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation, throughput = Validation(every_n_iterations=2), Throughput()
    usual = [tiny_run.sampler(), WeightSync(), throughput, validation, OfShortness()]
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual)
    rows = tiny_run.rows(trainer.log_dir)
    summary = json.loads((Path(trainer.log_dir) / "summary.json").read_text())
    assert summary == {
        "metric": "val/reward/shortness/mean",
        "accuracy_before": float(rows[0]["val/reward/shortness/mean"]),
        "accuracy_after": float(rows[3]["val/reward/shortness/mean"]),
        "seconds": throughput.seconds,
        "tokens_per_second": throughput.tokens / throughput.seconds,
        "artefacts": trainer.log_dir,
    }
    table = capsys.readouterr().out
    assert f"accuracy before    {summary['accuracy_before']:.4g}" in table
    assert f"artefacts          {trainer.log_dir}" in table


@pytest.mark.parametrize(
    "others",
    [[Throughput()], [Validation()], [Validation(at_start=False), Throughput()]],
    ids=["no validation", "no throughput", "not at start"],
)
def test_without_the_callbacks_it_reads_it_is_refused(inputs: Path, tmp_path: Path, others: list[RFTCallback]) -> None:
    usual = [tiny_run.sampler(), WeightSync(), *others, RunSummary()]
    with pytest.raises(ValueError, match=r"RunSummary needs .*Validation \(at_start: true\) and Throughput"):
        tiny_run.fit(inputs, tmp_path, usual=usual)


def test_an_accuracy_that_is_not_measured_is_refused_before_the_first_iteration(inputs: Path, tmp_path: Path) -> None:
    class OfAccuracy(RunSummary):
        accuracy = "accuracy/mean"

    trainer = tiny_run.trainer(tmp_path, [OfAccuracy()])
    with pytest.raises(ValueError, match=r"OfAccuracy\.accuracy='accuracy/mean' .* use one of .*reward/shortness/mean"):
        trainer.fit(tiny_run.module(inputs), tiny_run.data(inputs))
    assert trainer.progress.phase == "rollout" and trainer.progress.iteration == 0


def test_what_could_not_be_measured_is_null(inputs: Path, tmp_path: Path) -> None:
    """Every validation response without a score is no reason to lose the run at its end."""
    model = tiny_run.module(inputs, scorer=tiny_run.scoring(unscored_in_validation, on_no_score="drop_response"))
    trainer = tiny_run.fit(inputs, tmp_path, [RunSummary()], model=model, max_iterations=1)
    summary = json.loads((Path(trainer.log_dir) / "summary.json").read_text())
    assert summary["accuracy_before"] is summary["accuracy_after"] is None and summary["seconds"] > 0


def unscored_in_validation(item: Any) -> float | None:
    return None if item.prompt.startswith("5+") else tiny_run.shortness(item)
