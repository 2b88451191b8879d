"""The index's torchvision is built for CUDA: define what its import asks of a torch for the CPU."""

import sys
from importlib.abc import MetaPathFinder


class _Operators(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou) -> Tensor")


sys.meta_path.insert(0, _Operators())
