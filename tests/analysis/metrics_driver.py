"""One of two gloo ranks, each adding what the other does not; prints what it computed."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from lightrft.analysis import Metrics


def add(metrics: Metrics, rank: int) -> None:
    metrics.mean_and_std("both", torch.tensor([1.0, 2.0, 6.0]) if rank == 0 else torch.tensor([10.0]))
    metrics.maximum("largest", torch.tensor([5, -1]) if rank == 0 else torch.tensor([7]))
    if rank == 0:
        metrics.mean_and_std("a/only_rank_0", torch.tensor([2.0, 4.0]))
        metrics.maximum("below_zero", -3.0)
    else:
        metrics.mean("z/only_rank_1", 8.0)
    metrics.mean_and_std("empty_on_rank_1", torch.tensor([1.0, 3.0][: 2 - 2 * rank]))


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metrics = Metrics()
    add(metrics, rank)
    print(json.dumps(metrics.compute()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
