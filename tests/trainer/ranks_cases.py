"""Tiny runs of every kind on some ranks; their checkpoints and metrics stay under ``inputs/<case>/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer import tiny_run

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


def run_all(inputs: Path, ranks: int) -> None:
    """Every case, one after the other, on this rank."""
    for case, options in CASES.items():
        model = tiny_run.module(inputs, **options)
        root = inputs / case / f"ranks-{ranks}"
        tiny_run.fit(inputs, root, [tiny_run.checkpoints()], model=model, devices=ranks)
