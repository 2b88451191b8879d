"""A run that samples with a server elsewhere is the one that samples in its own process, number by number."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines.served import ON_CPU, served
from trainer import tiny_run

from lightrft.callbacks import EngineSleepWake, StaleWeightsError, WeightSync
from lightrft.engines import Engine, RemoteEngine, VLLMEngine

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM is built for the GPU")]

QWEN2 = {**tiny_run.QWEN2, "hidden_size": 64, "max_position_embeddings": 128}  # heads of 32, as vLLM wants them


class Skipping(RemoteEngine):
    """A server that says it has taken what it has not."""

    def _send(self, tensors: Any) -> None:
        if self.pushed:
            for _ in tensors:
                pass
        else:
            super()._send(tensors)
        self.pushed = True

    pushed = False


def model(inputs: Path, lr: float) -> Any:
    return tiny_run.module(inputs, config=QWEN2, lr=lr, lr_scheduler=None)


def fit(inputs: Path, root: Path, engine: Engine, level: int, lr: float = 1e-2) -> Any:
    usual = [tiny_run.sampler(engine, temperature=0.8, top_p=0.9), WeightSync(), EngineSleepWake(level)]
    run = tiny_run.fit(inputs, root, usual=usual, model=model(inputs, lr))
    return tiny_run.rows(run.log_dir), tiny_run.weights(run)


def test_a_run_with_a_server_is_the_run_without_and_a_push_that_it_lost_stops_it(tmp_path: Path) -> None:
    inputs = tiny_run.write_inputs(tmp_path)
    here = VLLMEngine(enforce_eager=True, options={"block_size": 32})
    expected = fit(inputs, tmp_path / "here", here, level=2)
    actor = model(inputs, 0.0).actor
    actor.configure_model()
    its = SimpleNamespace(config=actor.transformer.config, tokenizer=actor.tokenizer, model=actor.transformer)
    (tmp_path / "served").mkdir()
    with served(its, tmp_path / "served", "--block-size", "32", *ON_CPU) as server:
        there = RemoteEngine(server.url, timeout_seconds=60)
        rows, weights = fit(inputs, tmp_path / "elsewhere", there, level=2)
        assert rows == expected[0] and all(torch.equal(weights[name], expected[1][name]) for name in expected[1])
        with pytest.raises(StaleWeightsError, match="weights of version 2"):
            fit(inputs, tmp_path / "skipping", Skipping(server.url, timeout_seconds=60), level=1, lr=1e-6)
