"""VLLMEngine holds the contract of engines that read media, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from lightrft.engines import OwnProcess, VLLMEngine

from .media_contract import MediaContract

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM's models that see need torchvision"),
]


class OnTheCPU(MediaContract):
    reads_videos = False
    make = staticmethod(lambda: VLLMEngine(dtype="float32", enforce_eager=True))


class OnTheGPU(MediaContract):
    reads_videos = False
    tolerance = 2e-2  # the attention kernel rounds to 19 bits
    device = torch.device("cuda")
    make = staticmethod(lambda: VLLMEngine(dtype="float32", enforce_eager=True, gpu_memory_utilization=0.2))

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def whole_convolutions(cls) -> Iterator[None]:
        """Not in TF32, which is what towers compute them in on GPUs."""
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        yield
        torch.backends.cudnn.allow_tf32 = before


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM is built for the GPU")


@on_cpu
class TestLlava(OnTheCPU):
    family = "llava"


@on_cpu
class TestLlavaInAProcessOfItsOwn(OnTheCPU):
    family = "llava"
    make = staticmethod(lambda: OwnProcess(VLLMEngine(dtype="float32", enforce_eager=True)))


@on_cpu
class TestQwen2VL(OnTheCPU):
    family = "qwen2_vl"


@on_cpu
class TestQwen2_5VL(OnTheCPU):
    family = "qwen2_5_vl"


@on_cpu
class TestQwen3VL(OnTheCPU):
    family = "qwen3_vl"


@on_cpu
class TestInternVL(OnTheCPU):
    family = "internvl"


@on_cpu
class TestQwenAudio(OnTheCPU):
    family = "qwen2_audio_30s"


@pytest.mark.gpu
class TestLlavaOnTheGPU(OnTheGPU):
    family = "llava"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def importable(cls) -> None:
        """vLLM 0.24 looks for a class of Pixtral's that transformers 5.17 has no more."""
        pytest.importorskip("vllm.model_executor.models.llava", exc_type=ImportError)


@pytest.mark.gpu
class TestQwenVLOnTheGPU(OnTheGPU):
    family = "qwen2_5_vl"


@pytest.mark.gpu
class TestQwen3VLOnTheGPU(OnTheGPU):
    family = "qwen3_vl"


@pytest.mark.gpu
class TestInternVLOnTheGPU(OnTheGPU):
    family = "internvl"


@pytest.mark.gpu
class TestQwenAudioOnTheGPU(OnTheGPU):
    family = "qwen2_audio_30s"
