"""Every rank holds the whole model: one device, and distributed data parallel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft.strategies.base import Sharding

class Replicated(Sharding):
    """Fabric's single-device and DDP strategies behind the common surface."""

    def setup(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        return self.fabric.setup(module, optimizer)

    def setup_frozen(self, module: nn.Module) -> Any:
        # DDP refuses a module without gradients, and there is nothing to reduce.
        placed = self.fabric.to_device(self.fabric.strategy.precision.convert_module(module))

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), self.fabric.strategy.precision.forward_context():
                return placed(*args, **kwargs)

        return evaluate

    def accumulate(self, module: Any, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.fabric.strategy, DDPStrategy):
            return self.fabric.no_backward_sync(module, enabled=not last)
        return nullcontext()

    def step(self, module: Any, optimizer: Any, clip_norm: float | None) -> float:
        limit = clip_norm if clip_norm is not None else math.inf
        # An infinite limit clips nothing and measures all the same.
        total = self.fabric.clip_gradients(module, optimizer, max_norm=limit, error_if_nonfinite=False)
        norm = float(cast(Tensor, total))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def full_params(self, parameters: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return parameters
