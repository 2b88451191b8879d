"""Tiny runs on as many ranks as torchrun started; their checkpoints and metrics stay under INPUTS/<case>/.

python ranks_driver.py INPUTS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import tiny_run
import torch

from lightrft.algorithms import Algorithm

# Dynamic sampling: half of the groups have equal rewards; one round is too few to replace them all, ten are not.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"algorithm": Algorithm("dapo"), "scorer": tiny_run.scoring(tiny_run.shortness_of_odd_sums)},
    "dapo, capped": {
        "algorithm": Algorithm("dapo", refill_rounds=1),
        "scorer": tiny_run.scoring(tiny_run.shortness_of_odd_sums),
    },
    "ppo": {"algorithm": Algorithm("ppo", normalize_rewards=True, clip_rewards=1.5)},
    "remax": {"algorithm": Algorithm("remax")},
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs, ranks = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
    for case, options in CASES.items():
        model = tiny_run.module(inputs, **options)
        trainer = tiny_run.trainer(
            inputs / case / f"ranks-{ranks}", [tiny_run.checkpoints()], model=model, devices=ranks
        )
        trainer.fit(model, tiny_run.data(inputs))
