"""The one surface by which the loop reaches a sharding strategy: no other module asks which strategy runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightrft.ops.collectives import everyone
from lightrft.strategies import state
from lightrft.strategies.state import State
from lightrft.strategies.whole import local_parts


class Sharding:
    """How models, optimizers and their state lie over ranks.

    Args:
        fabric: launched.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric

    @property
    def precision(self) -> Precision:
        """Fabric's plug-in; one for float16 has a state, the loss scale."""
        return self.fabric.strategy.precision

    def over_ranks(self, values: Tensor, operation: Literal["sum", "max"]) -> Tensor:
        """Sum or largest of each element over ranks, on this rank's device. Collective."""
        return cast(Tensor, self.fabric.all_reduce(values.to(self.fabric.device), reduce_op=operation))

    def everyone(self, item: Any) -> list[Any]:
        """What every rank gives, in the order of ranks. Collective; pickled, so for small things."""
        return everyone(item)

    def gather(self, values: Tensor) -> Tensor:
        """One-dimensional tensors of all ranks, of any length, joined in their order; on the host. Collective."""
        return torch.cat(self.everyone(values.detach().cpu()))

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send every rank its part, and get what each has for this one. Collective.

        Args:
            parts: uint8, for each rank, on the host.
            sizes: bytes that each rank has for this one.

        Returns:
            uint8, of each rank, on the host.
        """
        if self.fabric.world_size == 1:
            return list(parts)
        sent = torch.cat(list(parts)).to(self.fabric.device)
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, list(sizes), [len(part) for part in parts])
        return list(received.cpu().split(list(sizes)))

    def together(self, work: Callable[[], None]) -> None:
        """Do what may fail on one rank alone, and fail on all: the others would wait for it. Collective.

        Raises:
            RuntimeError: it failed on another rank; says which and how.
        """
        failure: Exception | None = None
        try:
            work()
        except Exception as error:
            failure = error
        reports = self.everyone(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report is not None:
                raise RuntimeError(f"Rank {rank} failed with {report}")

    def building(self) -> AbstractContextManager[None]:
        """Around the loading of weights, which may then wait for :meth:`setup` on ranks other than the first."""
        return nullcontext()

    def setup(self, module: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        """Prepare a trained module and its optimizer; returns the pair to call and to step."""
        raise NotImplementedError

    def _deafen(self, module: nn.Module) -> None:
        """Fabric calls hooks of every LightningModule that it set up; ours hear what the trainer announces alone."""
        if module in self.fabric._callbacks:
            self.fabric._callbacks.remove(module)

    def setup_frozen(self, module: nn.Module) -> Any:
        """Prepare a module that is only evaluated; returns what to call."""
        raise NotImplementedError

    def accumulate(self, module: Any, last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch's forward and backward; gradients are reduced over ranks in the ``last`` one."""
        raise NotImplementedError

    def backward(self, module: Any, loss: Tensor) -> None:
        """Inside :meth:`accumulate`: the gradients of ``loss``, averaged over ranks in the last micro-batch."""
        self.fabric.backward(loss, model=module)

    def step(self, module: Any, optimizer: Any, clip_norm: float | None) -> float:
        """Clip and step, or skip both where the gradient norm is not finite. Zeroes the gradients.

        Returns:
            the global gradient norm before clipping; not finite when the step was skipped.
        """
        raise NotImplementedError

    def held_weights(self, module: nn.Module) -> list[Tensor]:
        """Plain tensors, this rank's part, in which the weights of a module lie that was set up here."""
        return [part for weight in state.weights_of(module).values() for part in local_parts(weight)]

    def held_optimizer_state(self, module: Any, optimizer: Any) -> list[Tensor]:
        """Plain tensors, this rank's part, that only a step reads."""
        kept = state.unwrapped(optimizer).state.values()
        values = [value for one in kept for value in one.values() if isinstance(value, Tensor)]
        return [part for value in values for part in local_parts(value)]

    def snapshot(self, module: Any, optimizer: Any) -> State:
        """This rank's part of the state of what :meth:`setup` returned, copied to host memory. Collective.

        Each tensor is in the part of one rank, or divided over all; :func:`lightrft.strategies.state.write` makes a
        folder of the parts.
        """
        return state.snapshot(module.module, optimizer, self.precision.state_dict())

    def load(self, folder: Path, module: Any, optimizer: Any | None) -> None:
        """Read what any strategy wrote on any number of ranks; ``optimizer=None`` reads the weights alone. Collective.

        Raises:
            ValueError: the weights or the optimizer's parameters are others.
        """
        scaler = state.restore(folder, module.module, optimizer, self.precision.state_dict())
        if optimizer is not None:
            self.precision.load_state_dict(scaler)

    def state_bytes(self, module: nn.Module) -> int:
        """What :meth:`snapshot` of all ranks takes: weights, and two moments of each trained one in Adam."""
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in module.parameters()]
        return sum(size * (3 if trained else 1) for size, trained in sizes)
