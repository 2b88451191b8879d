"""Every rank holds the whole model: one device, and distributed data parallel."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft.strategies.base import Sharding
from lightrft.strategies.half_precision import ScaledFloat16
from lightrft.strategies.placement import Placement
from lightrft.strategies.process_group import TIMEOUT, backend_for


class DDP(DDPStrategy):
    """Distributed data parallel: every rank holds the whole model, gradients are averaged.

    Args:
    """

    def __init__(self) -> None:
        super().__init__(timeout=TIMEOUT)

    def placement(self, ranks: int, precision: str) -> Placement:
        """How a model lies over ``ranks``; gradients are reduced through copies of them."""
        return Placement(gradient_copies=int(ranks > 1))

    def _get_process_group_backend(self) -> str:
        return backend_for(self.root_device)

    def setup_module(self, module: nn.Module) -> Any:
        # Otherwise the next forward is refused, as gradients are still waited for.
        self._ddp_kwargs["find_unused_parameters"] = getattr(module, "may_leave_weights_unused", False)
        return super().setup_module(module)


class Replicated(Sharding):
    """Fabric's single device and :class:`DDP` behind the common surface."""

    def setup(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        called, stepped = self.fabric.setup(module, optimizer)
        self._deafen(module)
        return called, stepped

    def setup_frozen(self, module: nn.Module) -> Any:
        placed = self._placed(module)

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), self.precision.forward_context():
                return placed(*args, **kwargs)

        return evaluate

    def _placed(self, module: nn.Module) -> nn.Module:
        # DDP refuses a module without gradients, and there is nothing to reduce.
        return self.fabric.to_device(self.precision.convert_module(module))

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
        if isinstance(self.precision, ScaledFloat16):
            self.precision.after_step(math.isfinite(norm))
        return norm
