"""Runs under every strategy on 1, 2 and 4 ranks against the single process.

    python benchmarks/grid_distributed.py      # some minutes on 2 cores; `make grid-distributed`

Writes ``benchmarks/results/grid_distributed.json`` and ``docs/grid_distributed.md``; exits with 1 where one differs.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from grid import machine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from trainer.distributed_cases import (  # noqa: E402
    ALGORITHMS,
    DEGREES,
    KINDS,
    RANKS,
    TOLERANCE,
    Cell,
    Difference,
    cells,
    compare,
)

RESULTS = HERE / "results" / "grid_distributed.json"
PAGE = HERE.parent / "docs" / "grid_distributed.md"

_ABOUT = f"""# A run on many ranks is the run on one

<!-- written by benchmarks/grid_distributed.py (`make grid-distributed`); change that instead -->

Each number is the largest difference of any weight, of the actor and of `ppo`'s critic, after 3 iterations of 2
optimizer steps from the run of a single process: float32, AdamW with eps 1e-6, gloo on a CPU, a two-layer Qwen2. At
most {TOLERANCE:g} passes; sampled tokens and rewards must be equal, metrics within 1e-4. *SP* is
`trainer.sequence_parallel_size`; `hsdp` is `FSDP2(replicas=2)`. n/a: there is no such run, for want of ranks."""


def main() -> None:
    began = time.perf_counter()
    found: dict[Cell, Difference] = {}
    for cell, difference in compare(cell for cell in cells() if not cell.impossible):
        found[cell] = difference
        print(cell, difference, flush=True)
    seconds = round(time.perf_counter() - began)
    rows = [asdict(cell) | asdict(difference) for cell, difference in found.items()]
    RESULTS.write_text(json.dumps({"machine": machine(), "seconds": seconds, "cells": rows}, indent=1) + "\n")
    PAGE.write_text(page(found))
    print(PAGE.read_text())
    print(f"{len(found)} runs in {seconds} s")
    sys.exit("\n".join(f"{cell}: {difference}" for cell, difference in found.items() if not difference.small) or 0)


def page(found: dict[Cell, Difference]) -> str:
    """The document."""
    parts = [_ABOUT]
    for algorithm in ALGORITHMS:
        columns = [(ranks, degree) for ranks in RANKS for degree in DEGREES]
        heads = [
            f"{ranks} rank{'s' * (ranks > 1)}" + (f", SP {degree}" if degree > 1 else "") for ranks, degree in columns
        ]
        lines = [f"| {algorithm} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        for strategy in KINDS:
            shown = [_shown(found.get(Cell(algorithm, strategy, *column))) for column in columns]
            lines.append(f"| `{strategy}` | " + " | ".join(shown) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _shown(difference: Difference | None) -> str:
    if difference is None:
        return "n/a"
    return f"{difference.weights:.1e}".replace("e-0", "e-") + ("" if difference.small else " (fails)")


if __name__ == "__main__":
    main()
