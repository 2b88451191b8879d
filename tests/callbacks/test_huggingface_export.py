"""The exported folder is the trained model, under both trainers."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from trainer import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightrft.callbacks import HuggingFaceExport
from lightrft.data import SupervisedData, SupervisedSource


def exported(folder: Path) -> dict[str, torch.Tensor]:
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tiny_run.CHARACTERS)
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").named_parameters())


def test_after_a_reinforced_run(inputs: Path, tmp_path: Path) -> None:
    trainer = tiny_run.fit(inputs, tmp_path, [HuggingFaceExport()], max_iterations=1)
    held = exported(Path(trainer.log_dir) / "huggingface")
    assert tiny_run.differences(held, tiny_run.weights(trainer)) == []


def test_after_a_supervised_run(inputs: Path, tmp_path: Path) -> None:
    lessons = tmp_path / "lessons.jsonl"
    lessons.write_text("".join(json.dumps({"prompt": f"{a}+1=", "response": str(a + 1)}) + "\n" for a in range(8)))
    actor = tiny_run.actor(inputs)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        default_root_dir=tmp_path,
        callbacks=[HuggingFaceExport()],
        logger=pl.loggers.CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(actor, datamodule=SupervisedData(train=SupervisedSource(path=str(lessons))))
    held = exported(Path(str(trainer.log_dir)) / "huggingface")
    assert tiny_run.differences(held, {name: tensor.detach() for name, tensor in actor.export_parameters()}) == []


def test_a_folder_that_cannot_be_written_is_refused_before_training(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"HuggingFaceExport cannot write to .*file/model .*set its dirpath"):
        tiny_run.fit(inputs, tmp_path, [HuggingFaceExport(str(tmp_path / "file" / "model"))])
