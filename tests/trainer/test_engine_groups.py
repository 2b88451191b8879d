"""Runs whose engines lie over several ranks, and ranks with nothing to do: as on one rank, and none waits for ever."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import EngineSleepWake, Throughput, TrajectoryWriter, Validation, WeightSync
from lightrft.engines import Engine, TransformersEngine
from lightrft.module import RFTModule
from lightrft.samples import Prompt, Response, Sampling
from lightrft.trainer import RFTTrainer

# All that is split comes in twos.
CONFIG = tiny_run.QWEN2 | {"num_key_value_heads": 2}
CASES = {"dapo": tiny_run.shortness_of_odd_sums, "remax": tiny_run.shortness}


def callbacks(engine: Engine, level: Any = 2, probe: bool = True) -> list[RFTCallback]:
    sleep, sync = EngineSleepWake(level), WeightSync()
    sync.probe = probe
    return [tiny_run.sampler(engine), sync, sleep, Throughput(), Validation(2), TrajectoryWriter(1, True)]


def model_of(inputs: Path, name: str) -> RFTModule:
    return tiny_run.module(inputs, Algorithm(name), tiny_run.scoring(CASES[name]), config=CONFIG)


def run(inputs: Path, root: Path, size: int, span: int, name: str) -> dict[str, Any]:
    """On ``size`` ranks with engines over ``span`` of them, and a single validation prompt for all."""
    trainer = tiny_run.trainer(
        root,
        usual=callbacks(TransformersEngine(tensor_parallel_size=span)),
        devices=size,
        responses_per_update=16,
        limit_val_prompts=1,
    )
    trainer.fit(model_of(inputs, name), tiny_run.data(inputs))
    throughput = next(one for one in trainer.callbacks if isinstance(one, Throughput))
    return {
        "log_dir": trainer.log_dir,
        "tokens": throughput.tokens,
        "weights": {name: weight.tolist() for name, weight in tiny_run.weights(trainer).items()},
    }


def drawn(log_dir: str) -> list[tuple[str, str, list[int]]]:
    """Step, prompt and tokens of every response of all ranks."""
    found = []
    for path in Path(log_dir, "trajectories").iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found += [(path.name.rsplit("-", 1)[0], line["uid"], line["token_ids"]) for line in lines]
    return sorted(found)


@pytest.mark.parametrize(("size", "span", "name"), [(2, 2, "remax"), (4, 2, "dapo"), (4, 1, "remax")])
def test_a_run_is_the_same_on_any_ranks_with_engines_over_any_of_them(
    inputs: Path, tmp_path: Path, size: int, span: int, name: str
) -> None:
    one = run(inputs, tmp_path / "one", 1, 1, name)
    many = ranks.on_ranks(size, run, inputs, tmp_path / "many", size, span, name)
    assert drawn(many[0]["log_dir"]) == drawn(one["log_dir"])
    assert {rank["tokens"] for rank in many} == {one["tokens"]}
    rows, expected = tiny_run.rows(many[0]["log_dir"]), tiny_run.rows(one["log_dir"])
    assert rows.keys() == expected.keys() == {0, 1, 2, 3}
    for step, row in expected.items():
        assert rows[step].keys() == row.keys()
        for metric in row.keys() - {"weight_sync/mismatch_nats", "balance/busiest_over_mean"}:
            assert float(rows[step][metric]) == pytest.approx(float(row[metric]), rel=1e-4, abs=1e-5), (step, metric)
    for rank in many:
        for weight, values in rank["weights"].items():
            torch.testing.assert_close(torch.tensor(values), torch.tensor(one["weights"][weight]), rtol=0, atol=1e-5)


# Engines that differ


class Absent(Engine):
    """On a rank that holds no engine: it takes no weights, and its responses are made up."""

    def start(self, *args: Any) -> None: ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.weight_version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        one = torch.ones(1)
        return [[Response(one.long(), -one, "", "stop", self.weight_version) for _ in group] for group in seeds]

    def sleep(self, level: int = 1) -> None: ...

    def wake(self, parts: Any = ()) -> None: ...

    def close(self) -> None: ...


class Gathering(RFTCallback):
    """Weights are put together from all ranks, one by one, as a sharding strategy does."""

    def __init__(self) -> None:
        self.gathered = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        actor = pl_module.actor
        self._plain, actor.export_parameters = actor.export_parameters, self.export_parameters

    def export_parameters(self, *options: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._plain(*options):
            whole = tensor.detach().clone()
            dist.broadcast(whole, 0)
            self.gathered += 1
            yield name, whole


def with_differing_engines(inputs: Path, root: Path, case: str) -> tuple[int, int]:
    """Iterations done, and weights that were gathered."""
    gathering, second = Gathering(), os.environ["RANK"] == "1"
    engine = Absent() if case == "none on the second rank" and second else TransformersEngine()
    level = 2 if case == "weights lost on the second rank" and second else 1
    usual = [gathering, *callbacks(engine, level, probe=case != "none on the second rank")]
    trainer: RFTTrainer = tiny_run.trainer(root, usual=usual, devices=2)
    trainer.fit(model_of(inputs, "remax"), tiny_run.data(inputs))
    return trainer.progress.iteration, gathering.gathered


@pytest.mark.parametrize("case", ["none on the second rank", "weights lost on the second rank"])
def test_every_rank_takes_part_in_a_push_that_one_engine_needs(inputs: Path, tmp_path: Path, case: str) -> None:
    first, second = ranks.on_ranks(2, with_differing_engines, inputs, tmp_path, case)
    assert first == second and first[0] == 3 and first[1] > 0
