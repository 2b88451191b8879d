"""Ctrl-C and SIGTERM as a request to stop at the next phase boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_info


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is remembered; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no signal handlers, it never asks to stop.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in self._SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.signum = signum
        rank_zero_info(f"{signal.Signals(signum).name}: stopping at the end of this phase; Ctrl-C again stops at once.")

    def agreed(self, fabric: Fabric) -> int:
        """The signal that any rank received, 0 if none; ranks stop at the same boundary. Collective."""
        if fabric.world_size == 1:
            return self.signum
        highest = fabric.all_reduce(torch.tensor(float(self.signum), device=fabric.device), reduce_op="max")
        return int(cast(torch.Tensor, highest))
