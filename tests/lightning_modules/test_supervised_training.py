"""Supervised training under Lightning's Trainer: one batch is one step, however it is cut; losses count tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import supervised_cases
import torch
from PIL import Image
from ranks import on_ranks
from trainer import tiny_run

from lightrft.data import SupervisedData, SupervisedSource
from lightrft.engines.skeleton import auto_model
from lightrft.lightning_modules import ActorModule
from lightrft.media import placeholder_ids
from lightrft.media.references import audio

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


# Images and audio

FAMILIES = ("qwen2_5_vl", "qwen2_audio")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        tiny_run.write_media_lessons(folder, family)
    return folders


class Recorder(torch.optim.SGD):
    """Keeps the gradients that a step would apply."""

    gradients: list[torch.Tensor | None]

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.gradients = [p.grad for group in self.param_groups for p in group["params"]]
        return loss


def step(folder: Path, **options: Any) -> tuple[float, list[torch.Tensor | None]]:
    """Loss and gradients of one step over all lessons."""
    module = ActorModule(str(folder / "model"), optimizer=lambda params: Recorder(params, lr=1.0))
    run = trainer(max_steps=1, precision="64-true")
    run.fit(module, lessons(folder, **{"batch_size": 8, "val": None, **options}))
    return float(run.callback_metrics["train_loss"]), run.optimizers[0].gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_does_not_depend_on_which_media_share_a_micro_batch(seen: dict[str, Path], family: str) -> None:
    loss, whole = step(seen[family])
    assert all(gradient is not None and gradient.any() for gradient in whole)  # the tower's too
    for budget in (40, 1):  # some micro-batches without media
        cut_loss, cut = step(seen[family], tokens_per_microbatch=budget)
        assert cut_loss == pytest.approx(loss, rel=1e-10)
        for ours, expected in zip(cut, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_with_media_are_the_models_own(seen: dict[str, Path], family: str) -> None:
    folder = seen[family]
    module, data = ActorModule(str(folder / "model")), lessons(folder, batch_size=3)
    predicted = [value for batch in trainer().predict(module, data) for value in batch]
    records = [json.loads(line) for line in (folder / "lessons.jsonl").read_text().splitlines()]
    model = auto_model(module.transformer.config).from_pretrained(folder / "model", attn_implementation="eager").eval()
    assert len(predicted) == len(records)
    for record, value in zip(records, predicted):
        inputs, answer = own_inputs(module.processor, record, folder)
        with torch.no_grad():
            log_p = model(**inputs).logits[0].index_fill(-1, never_drawn(model.config), -torch.inf).log_softmax(-1)
        start = inputs["input_ids"].shape[1] - len(answer)
        expected = sum(float(log_p[start - 1 + i, token]) for i, token in enumerate(answer))
        assert value == pytest.approx(expected, rel=1e-4)


def never_drawn(config: Any) -> torch.Tensor:
    return torch.tensor(placeholder_ids(config))


def own_inputs(processor: Any, record: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[int]]:
    """The whole record in one call of its processor, and the tokens of the answer."""
    end = processor.tokenizer.eos_token
    answer = processor.tokenizer(record["response"] + end, add_special_tokens=False)["input_ids"]
    prompt = record["prompt"].replace("<image>", "<|image_pad|>").replace("<audio>", "<|AUDIO|>")
    files = [str(folder / name) for name in record.get("images") or record.get("audios") or []]
    media: dict[str, Any] = {}
    if files and "images" in record:
        media["images"] = [Image.open(file) for file in files]
    elif files:
        rate = processor.feature_extractor.sampling_rate
        media = {"audio": [audio(file, rate).numpy() for file in files], "sampling_rate": rate}
    made = processor(text=[prompt + record["response"] + end], return_tensors="pt", **media)
    return dict(made), answer
