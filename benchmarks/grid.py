"""The grid: of every algorithm, the gradient of a step cut in every way against that of the undivided step.

    python benchmarks/grid.py                  # some minutes on 2 cores; `make grid`

Writes ``benchmarks/results/grid.json`` and ``docs/grid.md``; exits with 1 where a tolerance is missed, or where a bug
that was put in on purpose is not seen.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from gradient_cases import CUTS, HEADS, LAYOUTS, PRECISIONS, SEEN, TOLERANCE, Measured, measure

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "grid.json"
PAGE = HERE.parent / "docs" / "grid.md"
# Each holds the worst of the steps whose attribute has that value; the last that of all.
COLUMNS: dict[str, tuple[str, Any] | None] = {
    **{f"{cut} micro-batch{'es' if cut != '1' else ''}": ("cut", cut) for cut in CUTS},
    "1 rank": ("ranks", 1),
    "2 ranks": ("ranks", 2),
    **{layout: ("layout", layout) for layout in LAYOUTS},
    **{f"{head} head": ("head", head) for head in HEADS},
    "any": None,
}
Table = dict[str, dict[str, float]]


def main() -> None:
    began = time.perf_counter()
    found = measure(few=False)
    seconds = round(time.perf_counter() - began)
    right = {precision: table(found, precision, wrong=False) for precision in PRECISIONS}
    wrong = {precision: table(found, precision, wrong=True) for precision in PRECISIONS}
    counts = {"seconds": seconds, "steps": len(found)}
    results = {"machine": machine(), **counts, "tolerance": TOLERANCE, "worst": right, "with_a_bug": wrong}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(right, wrong, len(found)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    print(f"{len(found)} steps in {seconds} s")
    sys.exit("\n".join(missed(found)) or 0)


def table(found: list[Measured], precision: str, wrong: bool) -> Table:
    """By row and column, the worst difference; and the share of tokens whose gradient a bound stopped."""
    rows: dict[str, list[Measured]] = {}
    for one in found:
        if one.precision == precision and one.wrong == wrong:
            rows.setdefault(one.row, []).append(one)
    return {
        row: {column: worst(steps, has) for column, has in COLUMNS.items()} | {"clipped": round(steps[0].clipped, 3)}
        for row, steps in rows.items()
    }


def worst(steps: list[Measured], has: tuple[str, Any] | None) -> float:
    chosen = [one.difference for one in steps if has is None or getattr(one, has[0]) == has[1]]
    return float(f"{max(chosen):.1e}")


def missed(found: list[Measured]) -> list[str]:
    """Steps too far from the undivided one, and bugs on purpose that change too little."""
    failures = [
        f"{one}: off by {one.difference:.1e}, at most {TOLERANCE[one.precision]:.0e} is wanted"
        for one in found
        if not one.wrong and not one.difference <= TOLERANCE[one.precision]
    ]
    for row in dict.fromkeys(one.row for one in found if one.wrong):
        changed = max(one.difference for one in found if one.row == row)
        if not changed > SEEN:
            failures.append(f"{row}: changes the gradient by {changed:.1e} only")
    return failures


def machine() -> dict[str, Any]:
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__}


# --- the page --------------------------------------------------------------------------------------------------------


def page(right: dict[str, Table], wrong: dict[str, Table], steps: int) -> str:
    """The tables in Markdown, with what they show."""
    parts = [_ABOUT.format(steps=steps, chunk=HEADS["chunked"]), _STEP]
    for precision, rows in right.items():
        name = _name(precision)
        most = max(cells["any"] for cells in rows.values())
        parts.append(f"## {name}\n\nAt most {TOLERANCE[precision]:.0e} is allowed; the worst is {most:.1e}.")
        parts.append(_markdown(rows))
    parts.append(_BUGS)
    parts += [f"{_name(precision)}:\n\n{_markdown(rows)}" for precision, rows in wrong.items()]
    return "\n\n".join(parts) + "\n"


_ABOUT = """# The gradient does not depend on how a step is cut

<!-- written by benchmarks/grid.py (`make grid`); change that instead -->

Each number is `‖g − g₀‖ / ‖g₀‖`, where `g₀` is the gradient of the undivided step (one micro-batch, one rank, packed,
the head in one piece) and `g` that of the same step cut. Every row was run with 1, 2, 4 and uneven micro-batches a
rank, on 1 rank and on 2 (gloo), packed and padded, with the head whole and {chunk} tokens at a time, in float32 and
float64: {steps} steps. A column holds the worst of the steps with its property, whatever else was cut; for `ppo` the
worse of actor and critic. *Clipped* is the share of tokens whose gradient a bound stopped."""

_STEP = """A step is 6 groups of 3 responses of 0 to 9 tokens to a two-layer Qwen2. One response is dropped, three are
truncated, one group has equal rewards (`dapo` and the group filter leave it out). The engine's log-probs are those of
other weights, the reference's of others again, and between the old log-probs and the step the policy's weights moved.
The weight of a KL is 0.1. *Half dropped* leaves the second of two ranks without a trained token of its own. Rows
without a preset's name are combinations; the code is
[`benchmarks/gradient_cases.py`](../benchmarks/gradient_cases.py). That dynamic sampling with refill chooses the same
groups on any number of ranks is held by [`tests/trainer/test_ranks.py`](../tests/trainer/test_ranks.py)."""

_BUGS = """## With a bug on purpose

So that the measure is known to see one. *Local means*: every micro-batch divides by its own counts, the field's bug.
*Local statistics*: every rank whitens, normalises rewards and ranks entropies by its own share alone."""


def _name(precision: str) -> str:
    return {"32-true": "float32", "64-true": "float64"}[precision]


def _markdown(rows: Table) -> str:
    columns = [*COLUMNS, "clipped"]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row, cells in rows.items():
        lines.append(f"| {row} | " + " | ".join(_shown(column, cells[column]) for column in columns) + " |")
    return "\n".join(lines)


def _shown(column: str, value: float) -> str:
    if column == "clipped" or value >= SEEN or not value:
        return f"{value:.2f}" if value else "0"
    return f"{value:.1e}".replace("e-0", "e-")


if __name__ == "__main__":
    main()
