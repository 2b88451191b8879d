"""Whole runs of models that see or hear: the same trainer, data, callbacks and checkpoints as those of text."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from media_worlds import media_world
from torch import Tensor
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callbacks import EngineSleepWake, StaleWeightsError, TrajectoryWriter, WeightSync
from lightrft.data import PromptData, Source
from lightrft.engines import TransformersEngine, VLLMEngine
from lightrft.lightning_modules import ActorModule
from lightrft.module import RFTModule
from lightrft.rewards import RewardInput
from lightrft.samples import Prompt
from lightrft.trainer import RFTTrainer

SEEN, HEARD = ("images", "image", "image/png"), ("audios", "audio", "audio/wav")
FAMILIES = {"llava": SEEN, "qwen2_5_vl": SEEN, "qwen2_audio": HEARD, "qwen2_audio_30s": HEARD}
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM is built for the GPU")


@pytest.fixture(scope="module", params=["llava", "qwen2_audio"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, with prompts beside it: two items, none, one, and so on."""
    world, (kind, part, mime) = media_world(request.param), FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    world.model.save_pretrained(folder / "model")
    world.processor.save_pretrained(folder / "model")
    records = []
    for number in range(12):
        items = [world.reference(number + i) for i in range((2, 0, 1)[number % 3])]
        uris = [f"data:{mime};base64,{base64.b64encode(item).decode()}" for item in items]
        text = "".join(f"[{number + i}]<{part}>" for i in range(len(items))) + "[7][8]"
        records.append({"input": text, "reference": str(number), "label": "exact_match", kind: uris})
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def fit(
    folder: Path,
    root: Path,
    callbacks: Sequence[Any] = (),
    engine: Any = None,
    ckpt_path: str | None = None,
    lr: float = 1e-3,
    **options: Any,
) -> RFTTrainer:
    actor = ActorModule(
        model=str(folder / "model"), optimizer=lambda params: torch.optim.AdamW(params, lr=lr, eps=1e-6)
    )
    module = RFTModule(actor, Algorithm(kl_coefficient=0.05), tiny_run.scoring(evenness))
    usual = [tiny_run.sampler(engine), WeightSync(), TrajectoryWriter(token_ids=True)]
    run = tiny_run.trainer(root, callbacks, usual, **{"tokens_per_microbatch": 200, **options})
    run.fit(module, PromptData(train=[Source(path=str(folder / "train.jsonl"))]), ckpt_path)
    return run


def evenness(item: RewardInput) -> float:
    """Something that responses differ in."""
    return float(sum(map(ord, item.response)) % 7)


def test_a_run_trains_what_sees_or_hears_and_the_engine_keeps_up(folder: Path, tmp_path: Path) -> None:
    check_trained(folder, fit(folder, tmp_path), mismatch=1e-4, kl=1e-6)


@pytest.mark.vllm
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=on_the_cpu)])
@pytest.mark.parametrize("folder", ["qwen2_5_vl", "qwen2_audio_30s"], indirect=True)
def test_vllm_keeps_up(folder: Path, tmp_path: Path, device: str) -> None:
    pytest.importorskip("vllm")
    engine = VLLMEngine(dtype="float32", enforce_eager=True, gpu_memory_utilization=0.2)
    run = fit(folder, tmp_path, [EngineSleepWake(2 if device == "cuda" else 1)], engine, accelerator=device)
    # On a GPU convolutions are computed in TF32.
    check_trained(folder, run, *((1e-2, 1e-2) if device == "cuda" else (1e-4, 1e-5)))


def check_trained(folder: Path, run: RFTTrainer, mismatch: float, kl: float) -> None:
    """Tower and projector learned; the trainer's log-probs of what was sampled, media and all, are the engine's."""
    world = media_world(folder.name.rstrip("0123456789"))
    after = {name: tensor.cpu() for name, tensor in tiny_run.weights(run).items()}
    moved = {name for name, tensor in world.weights() if not torch.equal(tensor, after[name])}
    assert world.projector in moved and any(name.startswith(world.tower) for name in moved)
    rows = tiny_run.rows(run.log_dir)
    assert all(float(row["weight_sync/mismatch_nats"]) < mismatch for row in rows.values()), rows
    assert all(abs(float(row["kl/rollout"])) < kl for row in rows.values()), rows


def test_a_run_resumes_inside_an_iteration_with_its_media_read_again(folder: Path, tmp_path: Path) -> None:
    whole = fit(folder, tmp_path / "whole")
    first = fit(folder, tmp_path, [tiny_run.checkpoints(at="phase", max_keep=20)], max_iterations=2)
    saved = sorted((Path(first.log_dir) / "checkpoints").iterdir())
    inside = next(path for path in saved if path.name == "iteration-000001-before-update-1")
    resumed = fit(folder, tmp_path / "resumed", ckpt_path=str(inside))
    assert tiny_run.differences(tiny_run.weights(resumed), tiny_run.weights(whole)) == []


class KeepsWhatItSaw(TransformersEngine):
    """Features of an item are those of the weights that it was first seen with: an encoder's cache never dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.towers: dict[str, Tensor] = {}

    def update_weights(self, tensors: Any, version: int) -> None:
        super().update_weights(tensors, version)
        mine = dict(self._model.named_parameters())
        seeing = {name for name in mine if not name.startswith(("model.language_model.", "lm_head."))}
        self.towers = self.towers or {name: mine[name].detach().clone() for name in seeing}

    def generate(self, prompts: Sequence[Prompt], *arguments: Any) -> Any:
        mine = dict(self._model.named_parameters())
        now = {name: mine[name].detach().clone() for name in self.towers}
        with torch.no_grad():
            for name, old in self.towers.items():
                mine[name].copy_(old)
            try:
                return super().generate(prompts, *arguments)
            finally:
                for name, new in now.items():
                    mine[name].copy_(new)


def test_an_encoders_cache_that_outlives_its_weights_stops_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StaleWeightsError, match="sampled probe tokens"):
        fit(folder, tmp_path, engine=KeepsWhatItSaw(), lr=1e-2)
