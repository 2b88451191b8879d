"""Lets a torchvision that was built for CUDA be imported beside a torch for the CPU.

Python imports this by itself at its start from a folder on ``PYTHONPATH``, as vLLM looks at models in processes of its
own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# torchvision's compiled part does not load there, and then it misses these when it says what they mean for shapes.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class TorchvisionWithoutCuda:
    """Finds no module; defines the operators just before torchvision is imported."""

    libraries: list[object] = []  # noqa: RUF012 - operators go when nothing refers to their library

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path) if name == "torchvision" and not cls.libraries else None
        if found is None or "+cu" not in (Path(str(found.origin)).parent / "version.py").read_text():
            return None
        import torch

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(operator)
            cls.libraries.append(library)
        return None


if not any(getattr(finder, "__name__", "") == TorchvisionWithoutCuda.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, TorchvisionWithoutCuda)
