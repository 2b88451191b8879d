"""A slice of ``make grid-distributed``: whole runs under every strategy end as the single process does."""

from __future__ import annotations

import pytest
from trainer.distributed_cases import Cell, Difference, compare

SLICE = [
    Cell("grpo", "ddp", 2, 2),
    Cell("grpo", "fsdp2", 4, 2),
    Cell("grpo", "zero1", 2),
    Cell("ppo", "ddp", 2),
    Cell("ppo", "fsdp2", 2),
    Cell("ppo", "hsdp", 4),
    Cell("ppo", "zero2", 2),
    Cell("ppo", "zero3", 2, 2),
]


@pytest.fixture(scope="module")
def differences() -> dict[Cell, Difference]:
    return dict(compare(SLICE))


@pytest.mark.parametrize("cell", SLICE, ids=str)
def test_weights_tokens_rewards_and_metrics_are_those_of_one_process(
    cell: Cell, differences: dict[Cell, Difference]
) -> None:
    assert differences[cell].small, differences[cell]
