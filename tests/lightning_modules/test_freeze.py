"""Parts of a model that are frozen by the names of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import config_of
from media_worlds import media_world
from trainer import tiny_run

from lightrft.lightning_modules import ActorModule, CriticModule, LoRA

TOWER = ["model.audio_tower.*"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    media_world("qwen2_audio").model.save_pretrained(folder)
    media_world("qwen2_audio").processor.save_pretrained(folder)
    return str(folder)


def configured(module: Any) -> Any:
    module.configure_model()
    return module


def stepped(module: Any) -> set[str]:
    """Names of the weights that the optimizer has."""
    optimizer = module.configure_optimizers()
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return {name for name, weight in module.named_parameters() if id(weight) in held}


@pytest.mark.parametrize("kind", [ActorModule, CriticModule])
def test_frozen_weights_are_not_the_optimizers_by_the_same_names_for_actor_and_critic(kind: Any, folder: str) -> None:
    module = configured(kind(folder, freeze=[*TOWER, "*.layers.0.*"]))
    everything = {name for name, _ in module.named_parameters()}
    frozen = {name for name in everything if "audio_tower." in name or ".layers.0." in name}
    assert 10 < len(frozen) < len(everything) and stepped(module) == everything - frozen
    assert {name for name, weight in module.named_parameters() if not weight.requires_grad} == frozen


def test_frozen_layers_get_no_adapters(folder: str) -> None:
    actor = configured(ActorModule(folder, freeze=TOWER, lora=LoRA(rank=2)))
    adapted = [name for name, _ in actor.named_parameters() if ".lora_" in name]
    assert adapted and not any("audio_tower" in name for name in adapted)
    assert stepped(actor) == set(adapted)
    whole = configured(ActorModule(folder, lora=LoRA(rank=2)))
    assert any(".lora_" in name and "audio_tower" in name for name, _ in whole.named_parameters())


def test_either_name_of_tied_weights_freezes_them(tmp_path: Path) -> None:
    inputs = str(tiny_run.write_inputs(tmp_path) / "tokenizer")
    for pattern in ("lm_head.*", "model.embed_tokens.*"):
        actor = configured(ActorModule(config=config_of("qwen2"), tokenizer=inputs, freeze=[pattern]))
        assert not actor.transformer.lm_head.weight.requires_grad


@pytest.mark.parametrize("pattern", ["audio_tower.*", "model.audio_towers.*", "audio_tower"])
def test_a_pattern_that_matches_nothing_is_refused_with_names_that_are_close(pattern: str, folder: str) -> None:
    with pytest.raises(ValueError) as raised:
        ActorModule(folder, freeze=[*TOWER, pattern]).configure_model()
    assert f"freeze has {pattern!r}, which matches" in str(raised.value)
    assert "'model.audio_tower.*'" in str(raised.value)


def test_an_actor_with_nothing_to_train_is_refused(folder: str) -> None:
    actor = configured(ActorModule(folder, freeze=["*"]))
    with pytest.raises(ValueError, match=r"freeze \['\*'\] leaves the actor nothing to train"):
        actor.configure_optimizers()
    assert stepped(configured(CriticModule(folder, freeze=["*"]))) == {"head.weight", "head.bias"}
