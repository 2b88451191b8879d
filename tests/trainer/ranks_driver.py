"""A tiny run on as many ranks as torchrun started; its checkpoint and metrics stay in the folder.

python ranks_driver.py INPUTS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny_run
import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs, ranks = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
    trainer = tiny_run.trainer(inputs / f"ranks-{ranks}", [tiny_run.checkpoints()], devices=ranks)
    trainer.fit(tiny_run.module(inputs), tiny_run.data(inputs))
