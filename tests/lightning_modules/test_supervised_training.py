"""Supervised training under Lightning's Trainer: one batch is one step, however it is cut; losses count tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import supervised_cases
import torch
from ranks import on_ranks
from trainer import tiny_run

from lightrft.data import SupervisedData, SupervisedSource
from lightrft.lightning_modules import ActorModule

CUTS = ("1 micro-batch", "2 micro-batches", "4 micro-batches", "uneven")
Gradients = dict[tuple[str, str], torch.Tensor]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_run.write_inputs(tmp_path_factory.mktemp("supervised"))
    tiny_run.write_lessons(folder)
    return folder


@pytest.fixture(scope="module")
def gradients(inputs: Path) -> dict[int, Gradients]:
    """By number of ranks, then by (precision, cut)."""
    return {ranks: on_ranks(ranks, supervised_cases.gradients, inputs, ranks)[0] for ranks in (1, 2)}


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("64-true", 1e-10)])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_gradient_does_not_depend_on_the_cut(
    gradients: dict[int, Gradients], precision: str, tolerance: float, ranks: int, cut: str
) -> None:
    whole = gradients[1][precision, CUTS[0]]
    assert float((gradients[ranks][precision, cut] - whole).norm() / whole.norm()) <= tolerance


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainers_gradient_clipping_sees_the_whole_step(gradients: dict[int, Gradients], ranks: int) -> None:
    whole, clipped = gradients[1]["64-true", CUTS[0]], gradients[ranks]["clipped", "uneven"]
    torch.testing.assert_close(clipped, whole * 0.01 / (whole.norm() + 1e-6), rtol=1e-8, atol=1e-12)


def actor(inputs: Path) -> ActorModule:
    pl.seed_everything(0, verbose=False)
    return ActorModule(config=tiny_run.QWEN2, tokenizer=str(inputs / "tokenizer"))


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **options)


def lessons(inputs: Path, **options: Any) -> SupervisedData:
    source = SupervisedSource(path=str(inputs / "lessons.jsonl"))
    return SupervisedData(**{"train": source, "val": source, "test": source, "chat_template": False, **options})


def test_accumulation_by_batches_is_refused(inputs: Path) -> None:
    with pytest.raises(ValueError, match=r"accumulate_grad_batches .*tokens_per_microbatch"):
        trainer(max_steps=1, accumulate_grad_batches=2).fit(actor(inputs), lessons(inputs))


def test_losses_are_means_over_tokens_whatever_the_batches(inputs: Path) -> None:
    losses = [
        trainer().validate(actor(inputs), lessons(inputs, batch_size=size, tokens_per_microbatch=budget), verbose=False)
        for size, budget in ((8, 10_000), (8, 20), (3, 10_000), (1, 10_000))
    ]
    values = [loss["val_loss"] for (loss,) in losses]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)
    (tested,) = trainer().test(actor(inputs), lessons(inputs), verbose=False)
    assert tested["test_loss"] == pytest.approx(values[0], rel=1e-6)


def test_predictions_are_the_log_probs_of_the_responses(inputs: Path) -> None:
    module, data = actor(inputs), lessons(inputs, batch_size=3)
    batches = trainer().predict(module, data)
    predicted = [value for batch in batches for value in batch]
    records = [json.loads(line) for line in (inputs / "lessons.jsonl").read_text().splitlines()]
    assert len(predicted) == len(records)
    for record, value in zip(records, predicted):
        ids = [*module.tokenizer(record["prompt"] + record["response"]).input_ids, module.tokenizer.eos_token_id]
        start = len(record["prompt"])
        module.transformer.set_attn_implementation("eager")
        log_p = module.transformer(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert value == pytest.approx(expected, rel=1e-4)
