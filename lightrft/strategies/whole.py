"""Whole tensors of sharded parameters, by the kind of the parameter: DTensor (FSDP2), ZeRO 3's, or plain."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.distributed.tensor import DTensor


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Inside, the parameters can be computed with: ZeRO 3 keeps none of their elements in place. Collective."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def whole(tensor: Tensor) -> Tensor:
    """All elements of a parameter or of what was computed from it. Collective; for ZeRO 3 inside :func:`gathered`."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    # What was gathered is given back at the end of the context.
    return tensor.detach().clone() if hasattr(tensor, "ds_id") else tensor.detach()
