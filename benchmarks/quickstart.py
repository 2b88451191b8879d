"""A quickstart for several seeds and its control with permuted rewards: figures, a check, and the README's picture.

    python benchmarks/quickstart.py --task vision    # about half an hour on 2 cores; `make nightly-seeds`: all tasks

Writes ``benchmarks/results/quickstart.json`` and ``docs/images/quickstart.png``, with the task's name unless it is
text; exits with 1 where a target of any task is missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUN = HERE.parent / "examples" / "quickstart" / "run.py"
RESULTS, PICTURES = HERE / "results", HERE.parent / "docs" / "images"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Target:
    """What each seed must reach. A control must rise by less than 0.05, or by 0.15 where it ends below guessing.

    A careless pupil is below guessing at first, and what it hears from a control makes it guess.
    """

    seconds: float
    rise: float
    below: float = 1.0
    at_least: float = 0.0
    guessing: float = 0.0  # one of the answers that the question's kind has, each as likely
    title: str = ""


TARGETS = {
    "text": Target(480, 0.4, 0.5, 0.9, "Two-digit addition, 1000 held-out sums"),
    "vision": Target(
        600, 0.25, guessing=(1 / 3 + 1 / 4 + 1 / 4 + 1 / 2) / 4, title="Questions about images, 300 held-out ones"
    ),
    "audio": Target(600, 0.25, title="Questions about sounds, 300 held-out ones"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TARGETS, nargs="+", default=["text"])
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of `quickstart-seeds` and its like")
    parser.add_argument("--keep", action="store_true", help="take what is under --root already instead of running")
    options = parser.parse_args()
    failures = [failure for task in options.task for failure in check(task, options)]
    sys.exit("\n".join(failures) or 0)


def check(task: str, options: argparse.Namespace) -> list[str]:
    """Run, record and draw one task; the targets that it misses."""
    name = "quickstart" if task == "text" else f"quickstart_{task}"
    root = options.root / f"{name}-seeds"
    runs = {f"seed {seed}": measure(task, root, options.keep, seed) for seed in SEEDS}
    runs["control"] = measure(task, root, options.keep, SEEDS[0], "--control")
    found = json.dumps({"machine": machine(), "runs": runs}, indent=1)
    (RESULTS / f"{name}.json").write_text(f"{found}\n", encoding="utf-8")
    draw(runs, TARGETS[task].title, PICTURES / f"{name}.png")
    return [f"{task}, {failure}" for failure in missed(runs, TARGETS[task])]


def measure(task: str, root: Path, keep: bool, seed: int, *flags: str) -> dict[str, Any]:
    """One quickstart in a folder of its own."""
    root = root / "-".join([f"seed{seed}", *(flag.strip("-") for flag in flags)])
    if not (keep and (root / "summary.json").exists()):
        command = [sys.executable, RUN, "--task", task, "--root", root, "--seed", str(seed), *flags]
        subprocess.run(command, check=True)
    summary = json.loads((root / "summary.json").read_text())
    curve = read_curve(Path(summary["artefacts"]) / "metrics.csv")
    figures = {key: value for key, value in summary.items() if key not in ("metric", "artefacts")}
    return {**figures, "held_out_accuracy_by_iteration": curve}


def read_curve(path: Path) -> dict[int, float]:
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/reward/exact_match/mean"]]
    return {int(row["step"]): round(float(row["val/reward/exact_match/mean"]), 4) for row in rows}


def missed(runs: dict[str, dict[str, Any]], target: Target) -> list[str]:
    """Targets of the quickstart that these runs do not reach."""
    failures = []
    for name, run in runs.items():
        before, after = run["accuracy_before"], run["accuracy_after"]
        reached = before < target.below and after >= max(target.at_least, before + target.rise)
        if name == "control":
            if after >= max(before + 0.05, min(before + 0.15, target.guessing)):
                failures.append(f"control: rose from {before:.3f} to {after:.3f} without anything to learn from")
        elif not reached or run["seconds"] >= target.seconds:
            failures.append(f"{name}: {before:.3f} to {after:.3f} in {run['seconds']:.0f} s; wanted is {target}")
    return failures


def machine() -> dict[str, Any]:
    import torch

    return {"cores": len(os_cores()), "python": platform.python_version(), "torch": torch.__version__}


def os_cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)


def draw(runs: dict[str, dict[str, Any]], title: str, path: Path) -> None:
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
    axes.set_title(f"{title}, greedy; iteration 0 is the supervised start", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
