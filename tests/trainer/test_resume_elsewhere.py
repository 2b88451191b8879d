"""A run that resumes on other ranks, or under another strategy, is the run it was: tokens, rewards and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import RFTCheckpoint, Throughput, TrajectoryWriter, WeightSync

SIZES = {"prompts_per_iteration": 8, "responses_per_update": 16}


def run(
    inputs: str, root: str, algorithm: str, ranks: int, strategy: str = "auto", ckpt_path: str | None = None
) -> tuple[str, dict[str, torch.Tensor], float]:
    """Log folder, weights at the end, and tokens that were counted, of a run that saves at every boundary."""
    made = {
        "grpo": lambda: (Algorithm(kl_coefficient=0.05), tiny_run.shortness),
        "ppo": lambda: (Algorithm("ppo", normalize_rewards=True, clip_rewards=1.5), tiny_run.shortness),
        "dapo": lambda: (Algorithm("dapo", refill_rounds=2), tiny_run.shortness_of_odd_sums),
        "partial": lambda: (Algorithm(correction="token_tis"), tiny_run.shortness),
        "ahead": lambda: (Algorithm(correction="token_tis"), tiny_run.shortness),
    }
    chosen, reward = made[algorithm]()
    usual: list[RFTCallback] | None = None
    if algorithm in ("partial", "ahead"):
        rollout = tiny_run.partial() if algorithm == "partial" else tiny_run.ahead()
        usual = [rollout, WeightSync(), Throughput(), TrajectoryWriter(1, True)]
    model = tiny_run.module(Path(inputs), chosen, tiny_run.scoring(reward))
    saving = RFTCheckpoint(every_n_iterations=1, at="phase", max_keep=99)
    trainer = tiny_run.fit(
        Path(inputs),
        Path(root),
        [saving] if ckpt_path is None else [],
        usual,
        model=model,
        ckpt_path=ckpt_path,
        devices=ranks,
        strategy=strategy,
        **SIZES,
    )
    throughput = next(one for one in trainer.callbacks if type(one).__name__ == "Throughput")
    return trainer.log_dir, tiny_run.weights(trainer), throughput.tokens  # type: ignore[attr-defined]


class Runs:
    """Runs from the beginning, each made when first asked for."""

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs
        self._made: dict[Any, Any] = {}

    def whole(self, algorithm: str, ranks: int, strategy: str = "auto") -> tuple[Path, dict[str, torch.Tensor], float]:
        key = f"{algorithm}-{ranks}-{strategy}"
        if key not in self._made:
            root = str(self.inputs / key)
            self._made[key] = on_ranks(ranks, run, str(self.inputs), root, algorithm, ranks, strategy)[0]
        log_dir, weights, tokens = self._made[key]
        return Path(log_dir), weights, tokens

    def resumed(
        self, root: Path, folder: Path, algorithm: str, ranks: int, strategy: str = "auto"
    ) -> tuple[Path, dict[str, torch.Tensor], float]:
        arguments = (str(self.inputs), str(root), algorithm, ranks, strategy, str(folder))
        log_dir, weights, tokens = on_ranks(ranks, run, *arguments)[0]
        return Path(log_dir), weights, tokens


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_run.write_inputs(tmp_path_factory.mktemp("elsewhere")))


def assert_the_same(
    one: tuple[Path, dict[str, torch.Tensor], float], two: tuple[Path, dict[str, torch.Tensor], float]
) -> None:
    """``two`` resumed what ``one`` ran to the end."""
    theirs, mine = tiny_run.responses(one[0]), tiny_run.responses(two[0])
    assert mine and mine == {step: theirs[step] for step in mine}
    assert one[1].keys() == two[1].keys()
    for name, weight in one[1].items():
        torch.testing.assert_close(two[1][name], weight, rtol=0, atol=1e-5)
    assert one[2] == two[2]


CASES = [
    ("grpo", 4, 2, "iteration-000001"),
    ("grpo", 4, 2, "iteration-000001-before-score-0"),
    ("grpo", 4, 1, "iteration-000001-before-advantages-0"),
    ("grpo", 4, 2, "iteration-000001-before-update-1"),
    ("grpo", 4, 1, "iteration-000001-before-iteration-2"),
    ("grpo", 1, 2, "iteration-000001-before-update-1"),
    ("ppo", 2, 4, "iteration-000001-before-update-0"),
    ("ppo", 2, 1, "iteration-000001"),
    ("dapo", 2, 4, "iteration-000001-before-advantages-0"),
    ("partial", 4, 2, "iteration-000001"),
    ("partial", 2, 4, "iteration-000001-before-score-0"),
    ("ahead", 4, 1, "iteration-000001-before-score-0"),
    ("ahead", 2, 4, "iteration-000001"),
]


@pytest.mark.parametrize(("algorithm", "before", "after", "boundary"), CASES)
def test_on_another_number_of_ranks(
    runs: Runs, tmp_path: Path, algorithm: str, before: int, after: int, boundary: str
) -> None:
    whole = runs.whole(algorithm, before)
    assert_the_same(whole, runs.resumed(tmp_path, whole[0] / "checkpoints" / boundary, algorithm, after))


STRATEGIES = [
    ("grpo", "ddp", "fsdp2"),
    ("grpo", "ddp", "zero1"),
    ("grpo", "zero2", "fsdp2"),
    ("grpo", "zero3", "ddp"),
    ("ppo", "fsdp2", "zero3"),  # a critic's bias has one element, for two ranks
]


@pytest.mark.parametrize(("algorithm", "before", "after"), STRATEGIES)
def test_under_another_strategy(runs: Runs, tmp_path: Path, algorithm: str, before: str, after: str) -> None:
    whole = runs.whole(algorithm, 2, before)
    found = runs.resumed(tmp_path, whole[0] / "checkpoints" / "iteration-000001", algorithm, 2, after)
    assert_the_same(whole, found)
