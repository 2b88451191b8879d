"""VLLMEngine holds the contract of engines, on the CPU and, marked so, on a GPU."""

from __future__ import annotations

import pytest
import torch

from lightrft.engines import VLLMEngine

from .contract import EngineContract

pytest.importorskip("vllm")


class TestVLLMEngine(EngineContract):
    tolerance = 3e-5
    one_stream = False
    make = staticmethod(lambda: VLLMEngine(dtype="float32", enforce_eager=True))
