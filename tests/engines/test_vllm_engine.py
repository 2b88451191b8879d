"""VLLMEngine holds the contract of engines, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch

from lightrft.engines import VLLMEngine

from .contract import EngineContract

pytest.importorskip("vllm")


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM is built for the GPU")
class TestVLLMEngine(EngineContract):
    tolerance = 3e-5
    one_stream = False
    make = staticmethod(lambda: VLLMEngine(dtype="float32", enforce_eager=True))


@pytest.mark.gpu
class TestVLLMEngineOnTheGPU(EngineContract):
    tolerance = 2e-3
    one_stream = False
    device = torch.device("cuda")
    make = staticmethod(lambda: VLLMEngine(dtype="float32", enforce_eager=True, gpu_memory_utilization=0.2))
