"""TransformersEngine holds the contract of engines that read media."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from media_worlds import media_world

from lightrft.engines import EngineError, OwnProcess, TransformersEngine
from lightrft.samples import Sampling

from .media_contract import MediaContract

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="its processor needs torchvision")


class TestLlava(MediaContract):
    family = "llava"
    make = staticmethod(TransformersEngine)


class TestLlavaInSmallBatches(MediaContract):
    family = "llava"
    make = staticmethod(lambda: TransformersEngine(sequences_per_batch=2))


class TestLlavaInAProcessOfItsOwn(MediaContract):
    family = "llava"
    make = staticmethod(lambda: OwnProcess(TransformersEngine()))


@needs_torchvision
class TestQwen2VL(MediaContract):
    family = "qwen2_vl"
    make = staticmethod(TransformersEngine)


@needs_torchvision
class TestQwen2_5VL(MediaContract):
    family = "qwen2_5_vl"
    make = staticmethod(TransformersEngine)


@needs_torchvision
class TestQwen3VL(MediaContract):
    family = "qwen3_vl"
    make = staticmethod(TransformersEngine)


@needs_torchvision
class TestInternVL(MediaContract):
    family = "internvl"
    make = staticmethod(TransformersEngine)


class TestQwenAudio(MediaContract):
    family = "qwen2_audio"
    make = staticmethod(TransformersEngine)


@needs_torchvision
@pytest.mark.gpu
class TestQwenVLOnCuda(MediaContract):
    family = "qwen2_5_vl"
    make = staticmethod(TransformersEngine)
    device = torch.device("cuda:0")
    tolerance = 2e-3  # cuDNN computes the convolution over patches in TF32


@pytest.mark.gpu
class TestQwenAudioOnCuda(MediaContract):
    family = "qwen2_audio"
    make = staticmethod(TransformersEngine)
    device = torch.device("cuda:0")
    tolerance = 1e-4


@needs_torchvision
def test_a_prompt_that_ends_in_an_image_is_refused_where_positions_are_the_models_own():
    """transformers 5.19 adds one to each axis of the image's last token, and not to the largest."""
    world = media_world("qwen2_5_vl")
    engine = TransformersEngine()
    engine.start(world.config, world.processor, torch.device("cpu"))
    engine.update_weights(world.weights(), 0)
    asked = world.prompt("cut", [0])
    at = int(torch.isin(asked.token_ids, torch.tensor(engine._never_drawn)).nonzero()[-1])
    with pytest.raises(EngineError, match=r"'cut' ends in an image or video.*end in text"):
        engine.generate([replace(asked, token_ids=asked.token_ids[: at + 1])], Sampling(max_new_tokens=2), [[1]])
    engine.close()
