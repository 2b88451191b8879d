"""SGLangEngine holds the contract of engines that read media, in a process of its own, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from media_worlds import media_world

from lightrft.engines import EngineError, SGLangEngine

from .media_contract import MediaContract
from .test_sglang_engine import DEVICE, apart, needs_sglang

ON_CPU = DEVICE.type == "cpu"


@needs_sglang
@pytest.mark.timeout(600)
class OnItsDevice(MediaContract):
    """On a GPU in float16, the narrowest rounding that SGLang's kernels there take."""

    pytestmark = [] if ON_CPU else [pytest.mark.gpu]
    device = DEVICE
    tolerance = MediaContract.tolerance if ON_CPU else 6e-2
    make = staticmethod(lambda: apart("float32" if ON_CPU else "float16"))


class TestQwen2VL(OnItsDevice):
    family = "qwen2_vl"


class TestQwen2_5VL(OnItsDevice):
    family = "qwen2_5_vl"
    reads_videos = False


class TestQwen3VL(OnItsDevice):
    family = "qwen3_vl"


class TestQwenAudio(OnItsDevice):
    family = "qwen2_audio_30s"


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_family_that_sglang_has_no_model_of_is_refused_before_anything_starts(family):
    with pytest.raises(EngineError, match=r"does not serve \w+; choose VLLMEngine or TransformersEngine"):
        SGLangEngine().start(media_world(family).config, media_world(family).processor, torch.device("cpu"))
