"""Supervised training under Lightning's own strategies on two ranks is that of one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import ranks
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from trainer import tiny_run

from lightrft.callbacks import HuggingFaceExport
from lightrft.data import SupervisedData, SupervisedSource
from lightrft.lightning_modules import ActorModule
from lightrft.ops import split_by_tokens
from lightrft.strategies import whole

STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "model-parallel": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run.write_inputs(tmp_path_factory.mktemp("strategies"))
    tiny_run.write_lessons(folder)
    return folder


def fit(inputs: Path, strategy: Any, devices: int, *callbacks: pl.Callback) -> tuple[pl.Trainer, ActorModule]:
    """Three steps over all lessons, validated before and after each."""
    pl.seed_everything(0, verbose=False)
    module = ActorModule(
        config=tiny_run.QWEN2,
        tokenizer=str(inputs / "tokenizer"),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, eps=1e-6),
    )
    source = SupervisedSource(path=str(inputs / "lessons.jsonl"))
    options: dict[str, Any] = {"batch_size": 8 // devices, "tokens_per_microbatch": 30, "chat_template": False}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings: dict[str, Any] = {"max_steps": 3, "gradient_clip_val": 0.5, "callbacks": list(callbacks), **quiet}
    trainer = pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, **settings)
    trainer.fit(module, SupervisedData(train=source, val=source, test=source, **options))
    return trainer, module


class Cuts(pl.Callback):
    """Numbers of micro-batches that the budget makes of this rank's batches."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.counts.append(len(split_by_tokens([len(ids) for ids in batch.sequences], batch.tokens_per_microbatch)))


@dataclass
class Trained:
    """What a rank has at the end."""

    loss: float
    weights: dict[str, torch.Tensor]
    sharded: bool
    cuts: list[int]


def trained(inputs: Path, name: str) -> Trained:
    """A whole training on this rank, its model exported to the folder ``name``."""
    cuts, devices = Cuts(), 2 if name in STRATEGIES else 1
    strategy = STRATEGIES[name]() if name in STRATEGIES else "auto"
    trainer, module = fit(inputs, strategy, devices, cuts, HuggingFaceExport(str(inputs / name)))
    sharded = all(isinstance(weight, DTensor) for weight in module.parameters())
    weights = {key: whole(weight).clone() for key, weight in module.named_parameters()}
    return Trained(float(trainer.callback_metrics["val_loss"]), weights, sharded, cuts.counts)


@pytest.fixture(scope="module")
def alone(inputs: Path) -> Trained:
    (found,) = ranks.on_ranks(1, trained, inputs, "alone")
    return found


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_train_as_one(inputs: Path, alone: Trained, name: str) -> None:
    from transformers import AutoModelForCausalLM

    found = ranks.on_ranks(2, trained, inputs, name)
    assert [one.sharded for one in found] == [name == "model-parallel"] * 2
    assert found[0].cuts != found[1].cuts  # or the ranks would keep step by themselves
    for one in found:
        assert one.loss == pytest.approx(alone.loss, rel=1e-5)
        assert one.weights.keys() == alone.weights.keys()
        for key, weight in alone.weights.items():
            torch.testing.assert_close(one.weights[key], weight, rtol=0, atol=1e-5)
    for key, weight in AutoModelForCausalLM.from_pretrained(inputs / name).named_parameters():
        torch.testing.assert_close(weight, alone.weights[f"language_model.{key}"], rtol=0, atol=1e-5)


def refused(inputs: Path) -> list[str]:
    """What is said of the strategy's own sizes, and of predicting."""
    said = []
    with pytest.raises(ValueError) as sizes:
        fit(inputs, ModelParallelStrategy(), 2)
    said.append(str(sizes.value))
    trainer, module = fit(inputs, STRATEGIES["model-parallel"](), 2)
    with pytest.raises(ValueError) as predicting:
        trainer.predict(module, trainer.datamodule)
    return [*said, str(predicting.value)]


def test_what_the_strategy_cannot_do_is_refused(inputs: Path) -> None:
    for sizes, predicting in ranks.on_ranks(2, refused, inputs):
        assert "tensor_parallel_size=2" in sizes and "set data_parallel_size=2 and tensor_parallel_size=1" in sizes
        assert predicting == "predict does not run under ModelParallelStrategy; use strategy ddp, or one device."


def trained_with_an_image(folder: Path, devices: int) -> dict[str, torch.Tensor]:
    """Three steps over lessons of which one has images: on two ranks, one of them sees none."""
    module = ActorModule(str(folder / "model"), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    source = SupervisedSource(path=str(folder / "lessons.jsonl"))
    data = SupervisedData(train=source, batch_size=8 // devices, tokens_per_microbatch=30)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = "ddp" if devices > 1 else "auto"
    pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=3, **quiet).fit(module, data)
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def test_a_rank_without_images_keeps_step_with_one_that_has_some(tmp_path: Path) -> None:
    tiny_run.write_media_lessons(tmp_path, "qwen2_5_vl", counts=(2, 0, 0, 0, 0, 0, 0, 0))
    (alone,) = ranks.on_ranks(1, trained_with_an_image, tmp_path, 1)
    for found in ranks.on_ranks(2, trained_with_an_image, tmp_path, 2):
        for name, weight in alone.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)
