"""Whole tensors of sharded parameters, by the kind of the parameter: DTensor (FSDP2), ZeRO 3's, or plain."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Inside, the parameters can be computed with: ZeRO 3 keeps none of their elements in place. Collective."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All elements of a parameter or of what was computed from it. Collective; for ZeRO 3 inside :func:`gathered`.

    Args:
        tensor: sharded in whatever way.
        dtype: of the result where ``tensor`` is floating; shards are cast before they travel. ``None`` keeps it.
    """
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    if isinstance(tensor, DTensor):
        return cast(DTensor, tensor.detach().to(dtype)).full_tensor()
    # What was gathered is given back at the end of the context.
    return tensor.detach().to(dtype, copy=hasattr(tensor, "ds_id"))


def local_parts(tensor: Tensor) -> list[Tensor]:
    """Plain tensors in which this rank's part lies; under ZeRO 3 also the whole one, while it is gathered."""
    if isinstance(tensor, DTensor):
        return [cast(DTensor, tensor.detach()).to_local()]
    partition = getattr(tensor, "ds_tensor", None)
    return [tensor.detach(), *([] if partition is None else [partition])]
