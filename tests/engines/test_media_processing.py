"""What a processor makes of a prompt's media, item by item, and what weights are called in checkpoints."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import pytest
import torch
from media_worlds import FIRST, media_world
from PIL import Image

from lightrft.engines.checkpoint_names import checkpoint_names
from lightrft.media import MediaError, MediaProcessor
from lightrft.ops import joined_features
from lightrft.samples import Media, MediaItem, Prompt

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="its processor needs torchvision")
FAMILIES = [
    "llava",
    "qwen2_audio",
    *[pytest.param(name, marks=needs_torchvision) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_items_joined_are_what_the_processor_makes_of_the_whole_prompt(family):
    world = media_world(family)
    asked = world.prompt("three", [0, 2, 1])
    reading, whole = MediaProcessor(world.processor).read(asked), world.by_the_processor(asked)
    assert len(reading.items) == 3
    assert reading.token_ids.tolist() == whole.pop("input_ids")[0].tolist()
    del whole["attention_mask"]
    found = joined_features(reading.items) | {name: types[None] for name, types in reading.token_types.items()}
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_left_as_it_is(family):
    asked = media_world(family).prompt("text", [])
    reading = MediaProcessor(media_world(family).processor).read(asked)
    assert reading.token_ids is asked.token_ids
    assert (reading.token_types, reading.items) == ({}, [])


def test_placeholders_at_the_ends_and_side_by_side_are_expanded_each():
    world = media_world("llava")
    (placeholder,) = world.around
    asked = Prompt("x", torch.tensor([placeholder, placeholder, FIRST, placeholder]), "")
    asked = dataclasses.replace(asked, media=Media(images=tuple(map(world.reference, range(3)))))
    reading = MediaProcessor(world.processor).read(asked)
    assert reading.token_ids.tolist() == [placeholder] * 32 + [FIRST] + [placeholder] * 16


@needs_torchvision
def test_what_the_processor_refuses_is_refused_by_prompt_and_index():
    world = media_world("qwen2_5_vl")
    asked = world.prompt("thin", [0, 0])
    asked = dataclasses.replace(asked, media=Media(images=(world.reference(0), Image.new("RGB", (1, 900)))))
    with pytest.raises(MediaError, match=r"'thin': image 1 \(a Image\) cannot be used.*aspect ratio"):
        MediaProcessor(world.processor).read(asked)


@pytest.mark.parametrize("work", ["read", "decoded"])
def test_every_item_is_a_mark_of_progress_for_those_who_wait(work, monkeypatch):
    world, marks = media_world("llava"), []
    monkeypatch.setattr("lightrft.media.processing.mark", lambda: marks.append(work))
    getattr(MediaProcessor(world.processor), work)(world.prompt("three", [0, 1, 1]))
    assert len(marks) == 3


def test_features_of_unlike_shapes_are_not_joined():
    items = [MediaItem("images", torch.zeros(1), {}, {"pixel_values": torch.zeros(1, size)}) for size in (2, 3)]
    with pytest.raises(ValueError, match=r"pixel_values.*\(2,\), \(3,\)"):
        joined_features(items)


QWEN2_VL = {
    "model.visual.blocks.0.attn.qkv.weight": "visual.blocks.0.attn.qkv.weight",
    "model.language_model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
PUBLISHED = {
    "llava": {
        "model.vision_tower.encoder.layers.0.mlp.fc1.bias": "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        "model.multi_modal_projector.linear_1.weight": "multi_modal_projector.linear_1.weight",
        "model.language_model.norm.weight": "language_model.model.norm.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    },
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_VL,
    "qwen3_vl": {
        "model.visual.deepstack_merger_list.0.linear_fc1.bias": "model.visual.deepstack_merger_list.0.linear_fc1.bias",
        "model.language_model.norm.weight": "model.language_model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    "internvl": {
        "model.vision_tower.encoder.layer.0.lambda_1": "vision_tower.encoder.layer.0.lambda_1",
        "model.multi_modal_projector.linear_1.weight": "multi_modal_projector.linear_1.weight",
        "model.language_model.norm.weight": "language_model.model.norm.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    },
    "qwen2_audio": {
        "model.audio_tower.conv1.weight": "audio_tower.conv1.weight",
        "model.multi_modal_projector.linear.bias": "multi_modal_projector.linear.bias",
        "model.language_model.norm.weight": "language_model.model.norm.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_published_checkpoints_are_among_the_forms(family):
    forms = checkpoint_names(media_world(family).model, PUBLISHED[family])
    assert forms[0] == {name: name for name in PUBLISHED[family]}
    for name, published in PUBLISHED[family].items():
        assert published in {form[name] for form in forms}
