"""What ``configure_optimizers`` may return here; a schedule that would be stepped otherwise than it says is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from lightrft.trained import optimizer_and_scheduler


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def test_an_optimizer_alone_or_with_its_schedule(optimizer: torch.optim.Optimizer) -> None:
    schedule = LinearLR(optimizer)
    assert optimizer_and_scheduler(optimizer) == (optimizer, None)
    assert optimizer_and_scheduler({"optimizer": optimizer}) == (optimizer, None)
    for form in (schedule, {"scheduler": schedule}, {"scheduler": schedule, "interval": "step", "frequency": 1}):
        assert optimizer_and_scheduler({"optimizer": optimizer, "lr_scheduler": form}) == (optimizer, schedule)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("interval", "epoch", "set interval='step'"), ("frequency", 2, "set frequency=1")],
)
def test_a_schedule_that_wants_another_step_is_refused(
    optimizer: torch.optim.Optimizer, key: str, value: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=f"steps it after each optimizer step; {says}"):
        optimizer_and_scheduler(
            {"optimizer": optimizer, "lr_scheduler": {"scheduler": LinearLR(optimizer), key: value}}
        )


def test_a_schedule_that_waits_for_a_metric_is_refused(optimizer: torch.optim.Optimizer) -> None:
    with pytest.raises(ValueError, match="ReduceLROnPlateau waits for a metric"):
        optimizer_and_scheduler({"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer)})


def test_several_optimizers_are_refused(optimizer: torch.optim.Optimizer) -> None:
    with pytest.raises(ValueError, match=r"must return an optimizer, or a dict .*; got list"):
        optimizer_and_scheduler([optimizer, optimizer])
