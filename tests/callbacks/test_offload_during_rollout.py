"""Parts of the trainer are away while the engine samples, and a run, its checkpoints and its resumes are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import EngineSleepWake, OffloadDuringRollout, Validation, WeightSync
from lightrft.module import RFTModule
from lightrft.trainer import RFTTrainer

ALL = ["optimizer", "reference", "critic"]


class Held(RFTCallback):
    """Bytes on this rank of each part while the engine is awake, and of all when an update begins."""

    def __init__(self) -> None:
        self.awake: list[dict[str, int]] = []
        self.updating: list[dict[str, int]] = []

    def on_engine_ready(self, trainer: Any, pl_module: Any) -> None:
        self.awake.append(self._bytes(trainer))

    def on_update_end(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
        self.updating.append(self._bytes(trainer))

    @staticmethod
    def _bytes(trainer: Any) -> dict[str, int]:
        learner, model = trainer.learner, trainer.model
        tensors = {
            "optimizer": [
                tensor
                for one in learner.trained.values()
                for tensor in one.sharding.held_optimizer_state(one.module, one.optimizer)
            ],
            "reference": learner.sharding.held_weights(model.reference),
            "critic": learner.sharding.held_weights(model.critic),
        }
        return {part: sum(one.untyped_storage().nbytes() for one in found) for part, found in tensors.items()}


def module(inputs: Path, preset: str = "ppo") -> RFTModule:
    return tiny_run.module(inputs, Algorithm(preset, kl="loss_k3", kl_coefficient=0.05))


def run(
    inputs: Path, root: Path, parts: Sequence[str], *further: RFTCallback, ckpt_path: str | None = None, **options: Any
) -> tuple[RFTTrainer, Held]:
    held = Held()
    offload = [OffloadDuringRollout(list(parts))] if parts else []  # type: ignore[arg-type]
    usual = [tiny_run.sampler(), WeightSync(), EngineSleepWake(2), Validation(every_n_iterations=1), *offload, held]
    trainer = tiny_run.trainer(root, usual=usual, callbacks=further, **options)
    trainer.fit(module(inputs), tiny_run.data(inputs), ckpt_path)
    return trainer, held


def everything(trainer: RFTTrainer) -> dict[str, Any]:
    models = {"actor": trainer.model.actor, "critic": trainer.model.critic, "reference": trainer.model.reference}
    return {name: tiny_run.whole_weights(model) for name, model in models.items()}


def _on_ranks(inputs: Path, root: Path, strategy: str, size: int) -> dict[str, Any]:
    options = {"strategy": strategy, "devices": size}
    plain, _ = run(inputs, root / "plain", [], **options)
    trainer, held = run(inputs, root / "offloaded", ALL, **options)
    return {
        "differences": tiny_run.differences(everything(plain), everything(trainer)),
        "rows": [tiny_run.rows(one.log_dir) for one in (plain, trainer)],
        "awake": held.awake,
        "updating": held.updating,
    }


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_run_is_the_same_and_the_parts_are_away_while_the_engine_is_awake(
    inputs: Path, tmp_path: Path, strategy: str
) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    size = 1 if strategy == "auto" else 2
    for rank in on_ranks(size, _on_ranks, inputs, tmp_path, strategy, size):
        assert rank["differences"] == []
        assert rank["rows"][0] == rank["rows"][1] and rank["rows"][0].keys() == {0, 1, 2, 3}
        assert len(rank["awake"]) == 7  # three rollouts, four validations
        assert all(held == {"optimizer": 0, "reference": 0, "critic": 0} for held in rank["awake"])
        assert all(min(held.values()) > 0 for held in rank["updating"])


def test_only_what_is_listed_leaves(inputs: Path, tmp_path: Path) -> None:
    _, held = run(inputs, tmp_path, ["reference"])
    assert all(one["reference"] == 0 < one["critic"] for one in held.awake) and held.awake[-1]["optimizer"] > 0


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_checkpoints_of_every_boundary_are_those_without(inputs: Path, tmp_path: Path, strategy: str) -> None:
    size = 1 if strategy == "auto" else 2
    assert on_ranks(size, _checkpoints, inputs, tmp_path, strategy, size) == [[]] * size


def _checkpoints(inputs: Path, root: Path, strategy: str, size: int) -> list[str]:
    """Differences between the models of all checkpoints, one written after each phase."""
    options = {"strategy": strategy, "devices": size, "max_iterations": 2}
    found = []
    for name, parts in (("plain", []), ("offloaded", ALL)):
        trainer, _ = run(inputs, root / name, parts, tiny_run.checkpoints(at="phase", max_keep=99), **options)
        folders = sorted((Path(trainer.log_dir) / "checkpoints").glob("iteration-*"))
        assert len(folders) == 12
        found.append({one.name: [tiny_run.saved_state(one), tiny_run.saved_state(one / "critic")] for one in folders})
    return tiny_run.differences(*found)


@pytest.mark.parametrize("boundary", ["iteration-000001", "iteration-000001-before-score-0"])
def test_a_resume_where_parts_were_away_is_exact(inputs: Path, tmp_path: Path, boundary: str) -> None:
    whole, _ = run(inputs, tmp_path / "whole", ALL, tiny_run.checkpoints(at="phase", max_keep=99))
    folder = Path(whole.log_dir) / "checkpoints" / boundary
    resumed, _ = run(inputs, tmp_path / "resumed", ALL, ckpt_path=str(folder))
    assert tiny_run.differences(everything(whole), everything(resumed)) == []


def test_parts_that_a_run_has_not_are_refused(inputs: Path, tmp_path: Path) -> None:
    def start(part: Any, **options: Any) -> None:
        usual = [tiny_run.sampler(), WeightSync(), OffloadDuringRollout([part])]
        tiny_run.trainer(tmp_path, usual=usual).fit(tiny_run.module(inputs, **options), tiny_run.data(inputs))

    with pytest.raises(ValueError, match="the part critic, but the run has none"):
        start("critic")
    with pytest.raises(ValueError, match="the part reference, but the run holds none"):
        start("reference", algorithm=Algorithm(kl="none"))


@pytest.mark.parametrize("parts", [[], ["actor"], ["critic", "critic"]])
def test_a_list_that_says_nothing_sensible_is_refused(parts: Any) -> None:
    with pytest.raises(ValueError, match="list some of optimizer, reference, critic, each once"):
        OffloadDuringRollout(parts)
