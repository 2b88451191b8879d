"""Whole runs on images, what sees them frozen: it travels to the engine once, no step moves it, and a run resumes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from media_worlds import media_world, png
from ranks import on_ranks
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import EngineSleepWake, WeightSync
from lightrft.data import PromptData, Source
from lightrft.engines import TransformersEngine
from lightrft.lightning_modules import ActorModule
from lightrft.module import RFTModule
from lightrft.rewards import RewardInput
from lightrft.trainer import RFTTrainer

pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="its processor needs torchvision")
TOWER = "model.visual.blocks."


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its processor, images, and questions about none, one or two of them."""
    folder = tmp_path_factory.mktemp("inputs")
    media_world("qwen2_5_vl").model.save_pretrained(folder / "model")
    media_world("qwen2_5_vl").processor.save_pretrained(folder / "model")
    records = []
    for number in range(12):
        images = [f"{number}-{i}.png" for i in range(number % 3)]
        for i, name in enumerate(images):
            (folder / name).write_bytes(png(number + i))
        seen = "<|vision_start|><image><|vision_end|>" * len(images)
        records.append({"input": f"{seen}[{number}][7]", "images": images, "label": "exact_match"})
    (folder / "train.jsonl").write_text("".join(json.dumps(record | {"reference": "[1]"}) + "\n" for record in records))
    return folder


class Recording(TransformersEngine):
    """Notes what is pushed."""

    def __init__(self) -> None:
        super().__init__()
        self.pushes: list[set[str]] = []

    def update_weights(self, tensors: Any, version: int) -> None:
        given = dict(tensors)
        self.pushes.append(set(given))
        super().update_weights(given.items(), version)


def spread(item: RewardInput) -> float:
    """Other tokens score otherwise."""
    return sum(map(ord, item.response)) % 7


def run(inputs: Path, root: Path, engine: Recording, *callbacks: RFTCallback, **options: Any) -> RFTTrainer:
    def optimizer(weights: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(weights, lr=1e-3, eps=1e-6)

    actor = ActorModule(str(inputs / "model"), freeze=[f"{TOWER}*"], optimizer=optimizer)
    module = RFTModule(actor, Algorithm(kl_coefficient=0.05), tiny_run.scoring(spread))
    usual = [tiny_run.sampler(engine, max_new_tokens=4), WeightSync(), EngineSleepWake(), *callbacks]
    ckpt_path = options.pop("ckpt_path", None)
    trainer = tiny_run.trainer(root, usual=usual, model=module, tokens_per_microbatch=80, **options)
    trainer.fit(module, PromptData(train=[Source(path=str(inputs / "train.jsonl"))]), ckpt_path)
    return trainer


def test_a_frozen_tower_travels_once_and_stays_as_it_was(inputs: Path, tmp_path: Path) -> None:
    engine = Recording()
    trainer = run(inputs, tmp_path, engine)
    before, after = dict(media_world("qwen2_5_vl").weights()), tiny_run.weights(trainer)
    tower = {name for name in before if name.startswith(TOWER)}
    assert (
        engine.pushes == [before.keys(), *[before.keys() - tower] * 3][: len(engine.pushes)] and len(engine.pushes) > 2
    )
    assert {name for name in before if torch.equal(before[name], after[name])} == tower


def _resumed(inputs: str, root: str) -> list[str]:
    """What differs of a run that resumes in the middle of its second iteration."""
    options = {"devices": 2, "strategy": "fsdp2", "max_iterations": 2}
    saving = tiny_run.checkpoints(at="phase", max_keep=99)
    whole = tiny_run.weights(run(Path(inputs), Path(root) / "whole", Recording(), saving, **options))
    (boundary,) = (Path(root) / "whole").rglob("iteration-000001-before-update-1")
    resumed = run(Path(inputs), Path(root) / "resumed", Recording(), ckpt_path=str(boundary), **options)
    return tiny_run.differences(whole, tiny_run.weights(resumed))


def test_a_run_with_a_frozen_tower_resumes_in_shards(inputs: Path, tmp_path: Path) -> None:
    assert on_ranks(2, _resumed, str(inputs), str(tmp_path)) == [[], []]
