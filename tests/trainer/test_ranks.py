"""A run on two ranks is the run on one: responses, rewards, metrics and, after three iterations, weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from trainer import tiny_run
from trainer.ranks_cases import CASES, run_all

Runs = dict[int, Path]
# A rounding difference, and how long ranks wait for each other.
OF_RANKS = {"weight_sync/mismatch_nats", "balance/busiest_over_mean"}


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of every case's runs, on one rank and on two."""
    inputs = tiny_run.write_inputs(tmp_path_factory.mktemp("ranks"))
    for ranks in (1, 2):
        on_ranks(ranks, run_all, inputs, ranks)
    return inputs


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def runs(driven: Path, case: str) -> Runs:
    """Log folder by number of ranks."""
    return {ranks: driven / case / f"ranks-{ranks}" / "version_0" for ranks in (1, 2)}


def test_the_same_tokens_and_rewards(runs: Runs) -> None:
    assert tiny_run.responses(runs[1]) == tiny_run.responses(runs[2])


def test_the_same_metrics(runs: Runs) -> None:
    one, two = tiny_run.rows(runs[1]), tiny_run.rows(runs[2])
    assert one.keys() == two.keys()
    for step in one:
        assert one[step].keys() == two[step].keys()
        for name in one[step].keys() - OF_RANKS:
            assert float(two[step][name]) == pytest.approx(float(one[step][name]), rel=1e-4, abs=1e-5), (step, name)


def test_the_same_weights(runs: Runs) -> None:
    one, two = ({path.name: path for path in _models(runs[n])} for n in (1, 2))
    assert one.keys() == two.keys()
    for model in one:
        left, right = (tiny_run.saved_weights(runs[model]) for runs in (one, two))
        for name, weight in left.items():
            torch.testing.assert_close(right[name], weight, rtol=0, atol=1e-5)


def _models(log_dir: Path) -> list[Path]:
    """The folders of the actor, and of a critic."""
    folder = log_dir / "checkpoints" / "iteration-000003"
    return sorted(file.parent for file in folder.rglob(".metadata"))


def test_one_rank_waits_for_none_and_two_for_each_other(runs: Runs) -> None:
    one, two = (
        [float(row["balance/busiest_over_mean"]) for row in tiny_run.rows(runs[ranks]).values() if "responses" in row]
        for ranks in (1, 2)
    )
    assert len(one) == len(two) == 3
    assert one == pytest.approx([1.0] * 3) and all(1.0 < value < 1.2 for value in two)


def test_the_cases_do_what_they_are_for(driven: Path) -> None:
    def iterations(case: str) -> list[dict[str, str]]:
        return [row for row in tiny_run.rows(driven / case / "ranks-2" / "version_0").values() if "responses" in row]

    for row in iterations("dapo"):
        assert float(row["refill/missing_groups"]) == 0 and float(row["responses"]) == 16
    assert max(float(row["refill/rounds"]) for row in iterations("dapo")) > 1
    for row in iterations("dapo, capped"):
        assert float(row["responses"]) == 16 - 4 * float(row["refill/missing_groups"])
    assert any(float(row["refill/missing_groups"]) for row in iterations("dapo, capped"))
    assert not any(name.startswith("refill/") for row in iterations("grpo") for name in row)
    assert len(_models(driven / "ppo" / "ranks-2" / "version_0")) == 2
