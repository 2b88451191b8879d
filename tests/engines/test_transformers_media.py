"""TransformersEngine holds the contract of engines that read media."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from lightrft.engines import OwnProcess, TransformersEngine

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
