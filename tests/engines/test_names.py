"""Names of weights between two versions of transformers, each with names of its own in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from media_worlds import media_world

from lightrft.engines import OwnProcess, TransformersEngine
from lightrft.engines.process import names as process_names
from lightrft.engines.process.names import Names, written
from lightrft.ops.fingerprint import fingerprint

from .contract import world


def from_another_version(path: Path, table: dict[str, str]) -> Path:
    """As :func:`written` there, where ``table`` says what each name is in a checkpoint."""
    path.write_text(json.dumps({"version": "another", "names": table}))
    return path


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_vl", "llava"])
def test_beside_the_same_version_names_are_the_same(family, tmp_path):
    written(media_world(family).config, tmp_path / "names")
    names = Names.read(tmp_path / "names", media_world(family).config)
    for name, _ in media_world(family).weights():
        assert names.here(name) == names.there(name) == name


def test_beside_a_version_with_names_as_in_checkpoints_each_is_found_and_back(tmp_path):
    before = "audio_tower.conv1.weight"  # as up to transformers 5.8
    there = {name: name for name in (before, "language_model.lm_head.weight", "multi_modal_projector.linear.weight")}
    names = Names.read(from_another_version(tmp_path / "names", there), media_world("qwen2_audio").config)
    assert {name: names.here(name) for name in there} == {
        before: "model.audio_tower.conv1.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "multi_modal_projector.linear.weight": "model.multi_modal_projector.linear.weight",
    }
    assert [names.there(names.here(name)) for name in there] == list(there)
    assert names.here(f"{before}_scale") == "model.audio_tower.conv1.weight_scale"
    assert names.there("model.audio_tower.conv1.weight_scale") == f"{before}_scale"
    lm_head = [f"language_model.lm_head.lora_{matrix}.weight" for matrix in "AB"]
    assert [names.here(name) for name in lm_head] == ["lm_head.lora_A.weight", "lm_head.lora_B.weight"]
    assert [names.there(names.here(name)) for name in lm_head] == lm_head
    assert names.here("unknown.lora_A.weight") == "unknown.lora_A.weight"
    assert names.here("unknown") == names.there("unknown") == "unknown"


def test_a_push_and_a_probe_go_by_the_trainers_names(tmp_path, monkeypatch):
    old = {f"old.{name}": name for name, _ in world().weights()}
    monkeypatch.setattr(process_names, "written", lambda config, path: from_another_version(path, old))
    engine = OwnProcess(TransformersEngine(), site=[str(tmp_path)])
    engine.start(world().config, world().tokenizer, torch.device("cpu"))
    weights = {f"old.{name}": tensor for name, tensor in world().weights()}
    engine.update_weights(weights.items(), 0)
    assert engine.fingerprint(list(weights)) == {name: fingerprint(tensor) for name, tensor in weights.items()}
    layer = "old.model.layers.0.self_attn.q_proj"
    outputs, inputs = weights[f"{layer}.weight"].shape
    adapter = {f"{layer}.lora_A.weight": torch.randn(2, inputs), f"{layer}.lora_B.weight": torch.randn(outputs, 2)}
    engine.update_adapter(1.0, adapter.items(), 1)
    assert engine.fingerprint(list(adapter)) == {name: fingerprint(tensor) for name, tensor in adapter.items()}
    engine.close()
