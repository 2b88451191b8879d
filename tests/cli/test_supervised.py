"""``lightrft supervised``: learn from examples, then be the policy that ``lightrft fit`` improves."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import small_config
import torch
from trainer import tiny_run

from lightrft.cli import fit, supervised


@pytest.fixture
def config(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["lightrft"])
    lessons = tmp_path / "lessons.jsonl"
    lessons.write_text("".join(json.dumps({"prompt": f"{a}+1=", "response": str(a + 1)}) + "\n" for a in range(8)))
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "default_root_dir": str(tmp_path / "supervised"),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "logger": False,
            "callbacks": [{"class_path": "HuggingFaceExport", "init_args": {"dirpath": str(tmp_path / "taught")}}],
        },
        "model": {"config": copy.deepcopy(tiny_run.QWEN2), "tokenizer": str(inputs / "tokenizer")},
        "data": {"train": {"path": str(lessons)}},
    }


def test_what_supervised_training_exports_is_what_reinforcement_starts_from(
    inputs: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    supervised.main(["fit", "--config", small_config.written(tmp_path / "supervised.yaml", config)])
    settings = small_config.config(inputs, tmp_path / "runs")
    settings["model"]["actor"]["init_args"] = {"model": str(tmp_path / "taught")}  # its tokenizer too; lr 1e-6
    settings["trainer"]["callbacks"].append({"class_path": "HuggingFaceExport"})
    fit.main(["fit", "--config", small_config.written(tmp_path / "fit.yaml", settings)])
    (run,) = small_config.runs(tmp_path / "runs")
    from transformers import AutoModelForCausalLM

    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (tmp_path / "taught", run / "huggingface")
    )
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert before.keys() == after.keys() and 0 < change < 1e-5
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())


def test_a_vision_model_that_code_made_learns_from_yaml(tmp_path: Path, config: dict[str, Any]) -> None:
    tiny_run.write_media_lessons(tmp_path, "qwen2_5_vl")
    config["model"] = {"model": str(tmp_path / "model")}
    config["data"] = {"train": {"path": str(tmp_path / "lessons.jsonl")}, "tokens_per_microbatch": 40, "num_workers": 1}
    supervised.main(["fit", "--config", small_config.written(tmp_path / "supervised.yaml", config)])
    from transformers import AutoModelForImageTextToText, AutoProcessor

    before, after = (
        dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())
        for folder in (tmp_path / "model", tmp_path / "taught")
    )
    assert before.keys() == after.keys()
    assert all(0 < float((after[name] - before[name]).detach().abs().max()) < 1e-5 for name in before)
    assert AutoProcessor.from_pretrained(tmp_path / "taught").image_processor is not None


def test_a_mistyped_option_fails_with_its_name(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_config.written(tmp_path / "supervised.yaml", config)
    with pytest.raises(SystemExit) as stopped:
        supervised.main(["fit", "--config", path, "--trainer.max_step=3"])
    assert stopped.value.code == 2 and "--trainer.max_step=3" in capsys.readouterr().err
