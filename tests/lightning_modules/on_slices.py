"""A module whose rows are shared out over ranks, against the same module with its rows whole. Runs on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightrft.ops import Packed
from lightrft.strategies import Layout


@cache
def group_of(degree: int) -> dist.ProcessGroup:
    """The ranks that share a row with this one; each test has processes of its own."""
    return Layout(dist.get_world_size(), dist.get_rank(), degree).mesh("cpu").get_group("sequence")


def outputs(module: Any, packed: Packed, **options: Any) -> list[Tensor]:
    found = module(*packed.inputs, **options)
    return list(found) if isinstance(found, tuple) else [found]


def loss_of(found: Sequence[Tensor]) -> Tensor:
    """One in which every output pulls differently."""
    pulls = [torch.linspace(-1, 2, len(one), dtype=one.dtype) for one in found]
    return torch.stack([(pull * one + one.square()).sum() for pull, one in zip(pulls, found)]).sum()


def gradient(module: nn.Module, loss: Tensor) -> Tensor:
    """Of everything that trains, all of which the loss must reach."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trained(module))])


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().norm() / other.detach().norm().clamp_min(1e-30))


def check_slices(
    module: Any,
    packed: Packed,
    degrees: Sequence[int],
    tolerance: float = 1e-10,
    of_gradients: float = 1e-8,
    **options: Any,
) -> list[Tensor]:
    """At each degree: outputs and, summed over the ranks, the gradient of each parameter are as with rows whole.

    Args:
        of_gradients: how far a parameter's gradient may be off, in norms of it and of the mean parameter's.

    Returns:
        the outputs.
    """
    whole = outputs(module, packed, **options)
    expected = gradient(module, loss_of(whole))
    assert bool(expected.any()) or not len(packed.predict)
    sizes = [parameter.numel() for parameter in trained(module)]
    for degree in degrees:
        module.shard_sequences(group_of(degree))
        found = outputs(module, packed, **options)
        for ours, theirs in zip(found, whole):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        total = gradient(module, loss_of(found))
        dist.all_reduce(total, group=group_of(degree))
        mean = float(expected.norm()) / len(sizes) ** 0.5
        for ours, theirs in zip(total.split(sizes), expected.split(sizes)):
            off = float((ours - theirs).norm())
            assert off <= of_gradients * (float(theirs.norm()) + mean), (degree, off, float(theirs.norm()), mean)
        with torch.no_grad():
            for ours, theirs in zip(outputs(module, packed, **options), whole):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    module.shard_sequences(None)
    torch.testing.assert_close(outputs(module, packed, **options), whole, rtol=0, atol=0)
    return whole
