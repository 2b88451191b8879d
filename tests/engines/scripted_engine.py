"""An engine without a model that does what a test tells it to, in whatever process it is."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

import torch

from lightrft.engines import Engine, EngineError
from lightrft.whereabouts import here, mark


class StubbornError(EngineError):
    """Cannot be made from its message, and holds what cannot be pickled."""

    def __init__(self, message: str, lock: Any, code: int) -> None:
        super().__init__(message, lock, code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class ScriptedEngine(Engine):
    """``fingerprint`` evaluates what it is given; ``generate`` executes its prompts, and returns nothing."""

    def __init__(self, needs: str = "os") -> None:
        self.needs = needs
        self.pushed: list[tuple[str, torch.Tensor]] = []

    def start(self, config: Any, tokenizer: Any, device: torch.device, group: Any = None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.in_float8 = frozenset({"known once started"})
        self.module = importlib.import_module(self.needs)
        self.helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def fingerprint(self, names: Any) -> dict[str, Any]:
        return {name: eval(name, globals(), {"self": self}) for name in names}

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> Any:
        for prompt in prompts:
            exec(prompt, globals(), {"self": self})
        return []

    def update_weights(self, tensors: Any, version: int) -> None:
        self.weight_version = -1
        self.pushed = list(tensors)
        self.weight_version = version

    def update_adapter(self, scaling: float, tensors: Any, version: int) -> None:
        self.scaling = scaling
        self.update_weights(tensors, version)

    def close(self) -> None:
        self.helper.kill()
        self.helper.wait()


def open_for_reading(path: str) -> str:
    """What another process writes into the named pipe; waits for it."""
    with open(path) as pipe:
        return pipe.read()


__all__ = ["here", "mark", "os", "signal", "tempfile", "threading"]  # for what tests evaluate
