"""Names of weights between two versions of ``transformers``: in memory they may differ, in checkpoints they do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from lightrft.engines.checkpoint_names import checkpoint_names
from lightrft.engines.manifest import Manifest
from lightrft.engines.skeleton import build


class Names:
    """What the trainer calls a weight, and what the engine's process does.

    Args:
        ours: by the trainer's name, the engine's, of weights that have two.
    """

    def __init__(self, ours: Mapping[str, str]) -> None:
        self._ours = {name: own for name, own in ours.items() if name != own}
        self._theirs = {own: name for name, own in self._ours.items()}

    @classmethod
    def read(cls, path: Path, config: Any) -> Names:
        """Beside a trainer that has :func:`written` its names, with a model of the same config here."""
        there = json.loads(path.read_text())
        if there["version"] == transformers.__version__:
            return cls({})
        ours = {stored: name for name, stored in _in_checkpoints(config).items()}
        return cls({name: ours.get(stored, name) for name, stored in there["names"].items()})

    def here(self, name: str) -> str:
        """The engine's name of what the trainer names.

        ``<name>_scale`` are a weight's scales, ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` an adapter's.
        """
        return _renamed(self._ours, name)

    def there(self, name: str) -> str:
        """The trainer's name of what the engine names."""
        return _renamed(self._theirs, name)


def written(config: Any, path: Path) -> None:
    """Leave this process's names of a model's weights for :meth:`Names.read`."""
    path.write_text(json.dumps({"version": transformers.__version__, "names": _in_checkpoints(config)}))


def _in_checkpoints(config: Any) -> dict[str, str]:
    """By name in memory; ``transformers`` keeps the names in checkpoints as they are."""
    model = build(config, None, torch.device("meta"))
    return checkpoint_names(model, Manifest(model).named)[1]


def _renamed(names: Mapping[str, str], name: str) -> str:
    """Of a weight, of its scales, or of one of its layer's two adapter matrices."""
    layer, lora, matrix = name.rpartition(".lora_")
    weight = f"{layer}.weight" if lora else name.removesuffix("_scale")
    if name in names or weight not in names:
        return names.get(name, name)
    return names[weight].removesuffix(".weight") + lora + matrix if lora else names[weight] + "_scale"
