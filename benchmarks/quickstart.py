"""The quickstart for several seeds and its control with permuted rewards: figures, a check, and the README's picture.

    python benchmarks/quickstart.py            # about half an hour on 2 cores; `make nightly-seeds`

Writes ``benchmarks/results/quickstart.json`` and ``docs/images/quickstart.png``; exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUN = HERE.parent / "examples" / "quickstart" / "run.py"
RESULTS = HERE / "results" / "quickstart.json"
PICTURE = HERE.parent / "docs" / "images" / "quickstart.png"
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/quickstart-seeds"))
    parser.add_argument("--keep", action="store_true", help="take what is under --root already instead of running")
    options = parser.parse_args()
    runs = {f"seed {seed}": measure(options, seed) for seed in SEEDS}
    runs["control"] = measure(options, SEEDS[0], "--control")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
    draw(runs)
    sys.exit("\n".join(missed(runs)) or 0)


def measure(options: argparse.Namespace, seed: int, *flags: str) -> dict[str, Any]:
    """One quickstart in a folder of its own."""
    root = options.root / "-".join([f"seed{seed}", *(flag.strip("-") for flag in flags)])
    if not (options.keep and (root / "summary.json").exists()):
        subprocess.run([sys.executable, RUN, "--root", root, "--seed", str(seed), *flags], check=True)
    summary = json.loads((root / "summary.json").read_text())
    curve = read_curve(Path(summary.pop("artefacts")) / "metrics.csv")
    return {**summary, "held_out_accuracy_by_iteration": curve}


def read_curve(path: Path) -> dict[int, float]:
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/reward/exact_match/mean"]]
    return {int(row["step"]): round(float(row["val/reward/exact_match/mean"]), 4) for row in rows}


def missed(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Targets of the quickstart that these runs do not reach."""
    failures = []
    for name, run in runs.items():
        before, after = run["accuracy_before"], run["accuracy_after"]
        if name == "control":
            if after - before >= 0.05:
                failures.append(f"control: rose from {before:.3f} to {after:.3f} without anything to learn from")
        elif before >= 0.5 or after < 0.9 or run["seconds"] >= 480:
            measured = f"{before:.3f} to {after:.3f} in {run['seconds']:.0f} s"
            failures.append(f"{name}: {measured}; wanted are below 0.5 to at least 0.9 in 480 s")
    return failures


def machine() -> dict[str, Any]:
    import torch

    return {"cores": len(os_cores()), "python": platform.python_version(), "torch": torch.__version__}


def os_cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)


def draw(runs: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=150)
    for name, run in runs.items():
        curve = run["held_out_accuracy_by_iteration"]
        style = {"color": "0.6", "linestyle": "--"} if name == "control" else {"marker": "o", "markersize": 3}
        label = "control: rewards permuted across prompts" if name == "control" else name
        axes.plot(list(map(int, curve)), list(curve.values()), label=label, **style)
    axes.set(xlabel="GRPO iteration", ylabel="held-out accuracy", ylim=(0, 1))
    axes.set_title("Two-digit addition, 1000 held-out sums, greedy; iteration 0 is the supervised start", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center right")
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
