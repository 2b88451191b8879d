"""Milliseconds that 512 responses of 512 tokens take between processes: as flat tensors and as pickles.

    python benchmarks/exchange.py

There and back on one core, without the wire, whose bytes are printed: medians of 21.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lightrft.engines.flat import flatten, unflatten
from lightrft.samples import Response

RESPONSES, TOKENS, REPEATS = 512, 512, 21
RESULT = Path(__file__).parent / "results" / "exchange.json"


def milliseconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return round(median(times), 2)


def main() -> None:
    torch.set_num_threads(1)
    ids = torch.randint(150_000, (RESPONSES, TOKENS))
    responses = [Response(row.clone(), torch.randn(TOKENS), "four " * TOKENS, "length") for row in ids]
    found = {
        "tensors_ms": milliseconds(lambda: unflatten(flatten(responses))),
        "tensors_bytes": sum(tensor.nbytes for tensor in flatten(responses).values()),
        "pickles_ms": milliseconds(lambda: pickle.loads(pickle.dumps(responses))),
        "pickles_bytes": len(pickle.dumps(responses)),
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
