"""Statistics over ranks are those of every rank's values, whatever names a rank has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

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


def of_both() -> dict[str, float]:
    dist.init_process_group("gloo")
    metrics = Metrics()
    add(metrics, dist.get_rank())
    return metrics.compute()


def test_two_ranks_with_differing_names_agree_on_the_numbers_of_both() -> None:
    first, second = on_ranks(2, of_both)
    both = np.array([1.0, 2.0, 6.0, 10.0])
    assert (
        first
        == second
        == pytest.approx(
            {
                "both/mean": both.mean(),
                "both/std": both.std(),
                "largest": 7.0,
                "a/only_rank_0/mean": 3.0,
                "a/only_rank_0/std": 1.0,
                "below_zero": -3.0,
                "z/only_rank_1": 8.0,
                "empty_on_rank_1/mean": 2.0,
                "empty_on_rank_1/std": 1.0,
            }
        )
    )
