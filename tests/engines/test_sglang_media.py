"""SGLangEngine holds the contract of engines that read media, in a process of its own, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from media_worlds import media_world

from lightrft.engines import EngineError, SGLangEngine

from .media_contract import MediaContract
from .test_sglang_engine import DEVICE, apart, needs_sglang

unhurried = pytest.mark.timeout(600)


@needs_sglang
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has a contract of its own")
@unhurried
class OnTheCPU(MediaContract):
    make = staticmethod(lambda: apart("float32"))


@needs_sglang
@pytest.mark.gpu
@unhurried
class OnTheGPU(MediaContract):
    """In float16, the narrowest rounding that SGLang's kernels for GPUs take."""

    device = DEVICE
    tolerance = 6e-2
    make = staticmethod(lambda: apart("float16"))


class TestQwen2VL(OnTheCPU):
    family = "qwen2_vl"


class TestQwen2_5VL(OnTheCPU):
    family = "qwen2_5_vl"
    reads_videos = False


class TestQwen3VL(OnTheCPU):
    family = "qwen3_vl"


class TestQwenAudio(OnTheCPU):
    family = "qwen2_audio_30s"


class TestQwen2VLOnTheGPU(OnTheGPU):
    family = "qwen2_vl"


class TestQwen2_5VLOnTheGPU(OnTheGPU):
    family = "qwen2_5_vl"
    reads_videos = False


class TestQwen3VLOnTheGPU(OnTheGPU):
    family = "qwen3_vl"


class TestQwenAudioOnTheGPU(OnTheGPU):
    family = "qwen2_audio_30s"


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_family_that_sglang_has_no_model_of_is_refused_before_anything_starts(family):
    with pytest.raises(EngineError, match=r"does not serve \w+; choose VLLMEngine or TransformersEngine"):
        SGLangEngine().start(media_world(family).config, media_world(family).processor, torch.device("cpu"))
