"""Float16 training with a loss scale on which all ranks agree."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer


class ScaledFloat16(Precision):
    """Forward in float16 under autocast, weights and steps in float32, the loss scaled against underflow.

    torch's ``GradScaler`` decides on each rank by what that rank holds of a sharded gradient, so ranks would part ways;
    Fabric gives FSDP2 no float16 for that reason. Here the strategy's step says whether the global norm was finite.
    Micikevicius et al. 2017 (arXiv 1710.03740).

    Args:
        device_type: ``cuda`` or ``cpu``.
        scale: the first loss scale; halved where a gradient is not finite.
        growth_interval: finite steps after which it is doubled.
    """

    precision = "16-mixed"

    def __init__(self, device_type: str, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.device_type, self.scale, self.growth_interval = device_type, scale, growth_interval
        self._finite_steps = 0

    def forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, dtype=torch.float16)

    def convert_input(self, data: Any) -> Any:
        return _cast(data, torch.float16)

    def convert_output(self, data: Any) -> Any:
        return _cast(data, torch.float32)

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor * self.scale, model, *args, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Called by ``Fabric.clip_gradients``, once before each step."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / self.scale)

    def after_step(self, finite: bool) -> None:
        """Adapt the scale to whether the global gradient was finite, which all ranks know alike."""
        self._finite_steps = self._finite_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self._finite_steps % self.growth_interval == 0:
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "finite_steps": self._finite_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scale, self._finite_steps = state_dict["scale"], state_dict["finite_steps"]


def _cast(data: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor in nested lists and dicts as ``dtype``."""
    return apply_to_collection(data, Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
