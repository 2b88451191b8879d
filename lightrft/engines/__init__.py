"""Inference engines: what they all offer (:mod:`lightrft.engines.base`) and the ones LightRFT brings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightrft.engines.base import Engine, EngineError
from lightrft.engines.group import EngineGroup

if TYPE_CHECKING:
    from lightrft.engines.process.engine import OwnProcess
    from lightrft.engines.server.engine import RemoteEngine
    from lightrft.engines.sglang.engine import SGLangEngine
    from lightrft.engines.transformers.engine import TransformersEngine
    from lightrft.engines.vllm.engine import VLLMEngine

__all__ = [
    "Engine",
    "EngineError",
    "EngineGroup",
    "OwnProcess",
    "RemoteEngine",
    "SGLangEngine",
    "TransformersEngine",
    "VLLMEngine",
]

# Imported on first use: an engine's libraries take seconds to import, and a run uses one engine.
_ENGINES = {
    "OwnProcess": "lightrft.engines.process.engine",
    "RemoteEngine": "lightrft.engines.server.engine",
    "SGLangEngine": "lightrft.engines.sglang.engine",
    "TransformersEngine": "lightrft.engines.transformers.engine",
    "VLLMEngine": "lightrft.engines.vllm.engine",
}


def __getattr__(name: str) -> Any:
    if name in _ENGINES:
        return getattr(importlib.import_module(_ENGINES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ENGINES})
