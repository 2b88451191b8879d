"""Runs that sample with vLLM: what it does wrong in silence stops them, and a resumed one is the undisturbed one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer import tiny_run

from lightrft.callback import RFTCallback
from lightrft.callbacks import (
    EngineSleepWake,
    OffloadDuringRollout,
    StaleWeightsError,
    TrajectoryWriter,
    Validation,
    WeightSync,
)
from lightrft.engines import VLLMEngine
from lightrft.trainer import RFTTrainer

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM is built for the GPU")

# vLLM wants heads of 32; the probe's prompts are to fill a block of its prefix cache, of which 32 tokens is the least.
QWEN2 = {**tiny_run.QWEN2, "hidden_size": 64, "max_position_embeddings": 128}


class HeadLeftBehind(VLLMEngine):
    """Tied weights are handed on under the one name they come by."""

    def _whole_layers(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        names = set()
        for name, tensor in super()._whole_layers(tensors):
            if self.weight_version_before < 0 or name not in names | {"lm_head.weight"}:
                yield name, tensor
            names.add(name)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.weight_version_before = self.weight_version
        super().update_weights(tensors, version)


class ShardAlone(VLLMEngine):
    """Queries are handed on without keys and values."""

    def _whole_layers(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super()._whole_layers(tensors):
            if not ("k_proj" in name or "v_proj" in name) or not self.pushed:
                yield name, tensor
        self.pushed = True

    pushed = False


class Unforgetting(VLLMEngine):
    """The prefix cache outlives the weights."""

    def _forget(self) -> None:
        pass


def make(kind: type[VLLMEngine] = VLLMEngine) -> VLLMEngine:
    return kind(enforce_eager=True, options={"block_size": 32})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


def fit(inputs: Path, root: Path, engine: VLLMEngine, *callbacks: RFTCallback, **options: Any) -> RFTTrainer:
    lr, ckpt_path = options.pop("lr", 1e-2), options.pop("ckpt_path", None)
    usual = [tiny_run.sampler(engine, temperature=0.8, top_p=0.9), WeightSync(), EngineSleepWake(2), *callbacks]
    model = tiny_run.module(inputs, config=QWEN2, lr=lr, lr_scheduler=None)
    return tiny_run.fit(inputs, root, usual=usual, model=model, ckpt_path=ckpt_path, **options)


@on_the_cpu
@pytest.mark.parametrize(
    ("kind", "lr", "says"),
    [
        (HeadLeftBehind, 1e-6, r"weights of version 2.*first lm_head\.weight"),
        (ShardAlone, 1e-6, r"weights of version 2.*first model\.layers\.0\.self_attn\.k_proj\.weight"),
        (Unforgetting, 1e-2, "log-probs of sampled probe tokens differ"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_vllm_does_wrong_in_silence_stops_the_run(inputs, tmp_path, kind, lr, says):
    engine = make(kind)
    with pytest.raises(StaleWeightsError, match=says):
        # Level 1, on the CPU: weights stay, and only what changed is pushed.
        usual = [tiny_run.sampler(engine), WeightSync(), EngineSleepWake(1)]
        model = tiny_run.module(inputs, config=QWEN2, lr=lr, lr_scheduler=None)
        tiny_run.fit(inputs, tmp_path, usual=usual, model=model)


@on_the_cpu
def test_a_run_repeats_and_resumes_bit_by_bit(inputs, tmp_path):
    def callbacks() -> list[RFTCallback]:
        return [Validation(every_n_iterations=2), TrajectoryWriter(token_ids=True)]

    whole = fit(inputs, tmp_path / "whole", make(), *callbacks())
    rows = tiny_run.rows(whole.log_dir)
    assert all(float(rows[step]["weight_sync/mismatch_nats"]) < 1e-5 for step in (1, 2, 3)), rows
    fit(inputs, tmp_path / "cut", make(), *callbacks(), tiny_run.checkpoints(), max_iterations=2)
    resumed = fit(inputs, tmp_path / "cut", make(), *callbacks(), ckpt_path="last")
    assert tiny_run.rows(resumed.log_dir)[3] == tiny_run.rows(whole.log_dir)[3]
    for name, tensor in tiny_run.weights(whole).items():
        assert torch.equal(tensor, tiny_run.weights(resumed)[name])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_on_a_gpu_the_engine_gives_its_memory_to_the_trainer_and_is_never_stale(inputs, tmp_path, precision):
    engine = VLLMEngine(enforce_eager=True, gpu_memory_utilization=0.2)
    offload = OffloadDuringRollout(["optimizer", "reference"])
    run = fit(inputs, tmp_path, engine, offload, accelerator="cuda", precision=precision)
    rows = tiny_run.rows(run.log_dir)
    assert all(float(rows[step]["weight_sync/mismatch_nats"]) < 0.05 for step in (1, 2, 3)), rows
    assert engine.weight_version == -1  # closed
