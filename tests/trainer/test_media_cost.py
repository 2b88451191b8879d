"""What media cost a run: an image is decoded once for all responses to its prompt, and nothing of it stays."""

from __future__ import annotations

import gc
import io
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from media_worlds import FIRST, VOCABULARY, media_world, png
from PIL import Image
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import WeightSync
from lightrft.data import PromptData, Source
from lightrft.lightning_modules import ActorModule
from lightrft.media import MediaProcessor, processing
from lightrft.module import RFTModule
from lightrft.ops import CostModel, pack
from lightrft.rewards import RewardInput
from lightrft.samples import Batch, Media, Prompt, Response, Rollout, Sampling
from lightrft.sequence_cost import SequenceCost
from lightrft.strategies import Layout, make_fabric, sharding_of
from lightrft.workload import Workload

# Decoded once


def length(item: RewardInput) -> float:
    return float(len(item.response))


class Counts(RFTCallback):
    """How often each image was decoded: by the engine, and from there to the end of the iteration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded: Counter[str] = Counter()
        self.engine: list[Counter[str]] = []
        self.trainer: list[Counter[str]] = []
        self.asked: list[list[str]] = []
        decode = processing.image

        def counted(reference: Any) -> Any:
            if isinstance(reference, str):  # not the small ones that stand in where there are none
                self.decoded[Path(reference).name] += 1
            return decode(reference)

        monkeypatch.setattr(processing, "image", counted)

    def on_rollout_start(self, trainer: Any, pl_module: Any, prompts: Any) -> None:
        self.asked.append([Path(path).name for prompt in prompts for path in prompt.media.images])
        self.decoded.clear()

    def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        self.engine.append(Counter(self.decoded))
        self.decoded.clear()

    def on_iteration_end(self, trainer: Any, pl_module: Any) -> None:
        self.trainer.append(Counter(self.decoded))


def test_an_image_is_decoded_once_by_the_engine_and_once_by_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = media_world("llava")
    for part in (world.model, world.processor):
        part.save_pretrained(tmp_path / "model")
    records = []
    for number in range(4):
        names = [f"{number}-{i}.png" for i in range(1 + number % 2)]
        for i, name in enumerate(names):
            (tmp_path / name).write_bytes(png(3 * number + i))
        records.append({"input": f"[{number}]" + "<image>" * len(names), "images": names, "label": "exact_match"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    actor = ActorModule(str(tmp_path / "model"), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))
    model = RFTModule(actor, Algorithm(kl_coefficient=0.05), tiny_run.scoring(length))
    counts = Counts(monkeypatch)
    run = tiny_run.trainer(tmp_path / "run", [counts], [tiny_run.sampler(), WeightSync()], max_iterations=2)
    run.fit(model, PromptData(train=[Source(path=str(tmp_path / "train.jsonl"))]))
    assert run.samples_per_prompt == 4 and run.updates_per_iteration == 2
    assert [len(asked) for asked in counts.asked] == [6, 6]
    assert counts.engine == counts.trainer == [Counter(asked) for asked in counts.asked]


# Nothing stays


def picture(number: int) -> bytes:
    """A file of 0.2 MB, another one for every number."""
    noise = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).save(file, "BMP")
    return file.getvalue()


def rollout(iteration: int, images: list[bytes]) -> Rollout:
    """Two responses to a prompt with one image and to one with two."""
    (placeholder,) = media_world("llava").around
    generator = torch.Generator().manual_seed(iteration)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(FIRST, VOCABULARY, (count,), generator=generator)

    media = [Media(images=(images[0],)), Media(images=tuple(images[1:]))]
    prompts = [
        Prompt(f"{iteration}/{i}", torch.cat([tokens(3), torch.full((1 + i,), placeholder)]), "", media=of)
        for i, of in enumerate(media)
    ]
    groups = [
        [
            Response(tokens(4), log_probs=torch.zeros(4), text="", finish_reason="stop", reward=float(i))
            for i in range(2)
        ]
        for _ in prompts
    ]
    return Rollout(prompts, groups, Sampling(max_new_tokens=4))


def held() -> dict[str, float]:
    """By this process: tensors, their bytes, what Python allocated, and all of its memory; in MiB but the first."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "tensors": len(tensors),
        "tensors_mib": sum(one.nbytes for one in tensors) / 2**20,
        "python_mib": tracemalloc.get_traced_memory()[0] / 2**20,
        "resident_mib": resident / 2**20,
    }


def test_host_memory_is_flat_over_200_iterations_of_fresh_images() -> None:
    fabric = make_fabric("auto", "32-true", accelerator="cpu", devices=1)
    media, sharding = MediaProcessor(media_world("llava").processor), sharding_of(fabric)
    found: dict[int, dict[str, float]] = {}
    tracemalloc.start()
    try:
        for iteration in range(1, 201):
            samples = rollout(iteration, [picture(3 * iteration + i) for i in range(3)])
            batch = Batch.from_rollout(samples, [media.read(prompt) for prompt in samples.prompts])
            work = Workload(batch, SequenceCost(CostModel(0.01)), 60, Layout(1, 0), sharding, media)
            for part in work.micro_batches:
                packed = pack(part.sequences, part.prompt_lengths, part.response_mask, part.readings)
                assert packed.media["pixel_values"].shape[1:] == (3, 56, 56)
            if iteration in (20, 200):
                found[iteration] = held()
    finally:
        tracemalloc.stop()
    early, late = found[20], found[200]
    # Of one image in an iteration, 180 features are 6 MiB, 180 files 34, and 180 decoded images 45.
    assert late["tensors"] <= early["tensors"] + 20, found
    assert late["tensors_mib"] < early["tensors_mib"] + 1, found
    assert late["python_mib"] < early["python_mib"] + 1, found
    assert late["resident_mib"] < early["resident_mib"] + 24, found
