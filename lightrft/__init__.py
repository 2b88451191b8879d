"""LightRFT: reinforcement fine-tuning on PyTorch Lightning Fabric.

The names below are imported when first used, so ``import lightrft`` alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightrft.callback import RFTCallback as RFTCallback
    from lightrft.callback import RolloutCallback as RolloutCallback
    from lightrft.module import RFTModule as RFTModule
    from lightrft.samples import FIRE as FIRE
    from lightrft.samples import Batch as Batch
    from lightrft.samples import Prompt as Prompt
    from lightrft.samples import Response as Response
    from lightrft.samples import Rollout as Rollout
    from lightrft.samples import Sampling as Sampling
    from lightrft.trainer import RFTTrainer as RFTTrainer

__version__ = "0.1.0"

_MODULE_OF = {
    "RFTTrainer": "lightrft.trainer",
    "RFTModule": "lightrft.module",
    "RFTCallback": "lightrft.callback",
    "RolloutCallback": "lightrft.callback",
    "Prompt": "lightrft.samples",
    "Response": "lightrft.samples",
    "Rollout": "lightrft.samples",
    "Batch": "lightrft.samples",
    "Sampling": "lightrft.samples",
    "FIRE": "lightrft.samples",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
