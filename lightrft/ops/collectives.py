"""What several ranks say, for small things of any type."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def everyone(item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank of ``group`` gives, in the order of ranks. Collective; pickled, so for small things.

    Args:
        item: this rank's; can be pickled.
        group: ``None`` is all ranks, or this process alone where there is no process group.
    """
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    if ranks == 1:
        return [item]
    items: list[Any] = [None] * ranks
    dist.all_gather_object(items, item, group=group)
    return items
