"""A whole run whose engine has a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from trainer import tiny_run

from lightrft.callbacks import EngineSleepWake, TrajectoryWriter, Validation, WeightSync
from lightrft.engines import Engine, OwnProcess, TransformersEngine


def test_it_equals_the_run_with_the_engine_in_the_trainers_process(inputs: Path, tmp_path: Path) -> None:
    def run(name: str, engine: Engine) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[int, dict[str, str]]]:
        usual = [
            tiny_run.sampler(engine, temperature=0.9, top_p=0.95),
            WeightSync(),
            EngineSleepWake(2),
            Validation(every_n_iterations=2),
            TrajectoryWriter(token_ids=True),
        ]
        trainer = tiny_run.fit(inputs, tmp_path / name, usual=usual)
        log_dir = trainer.log_dir
        return tiny_run.weights(trainer), tiny_run.trajectories(log_dir), tiny_run.rows(log_dir)

    apart, inside = run("apart", OwnProcess(TransformersEngine())), run("inside", TransformersEngine())
    assert tiny_run.differences(apart, inside) == []
    assert apart[1] and len(apart[2]) > 3
