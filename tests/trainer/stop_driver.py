"""A tiny run that says when it is inside the second iteration's first update, and goes on when it is told to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny_run
import torch

from lightrft.callback import RFTCallback

torch.set_num_threads(1)


class Handshake(RFTCallback):
    def on_update_start(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        if (trainer.progress.iteration, trainer.progress.update) == (1, 0):
            print("in the update", flush=True)
            sys.stdin.readline()


if __name__ == "__main__":
    inputs, root = map(Path, sys.argv[1:])
    tiny_run.fit(inputs, root, [Handshake(), tiny_run.checkpoints(every_n_iterations=100)])
