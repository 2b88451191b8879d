"""Does every preset learn? From one supervised start, on two-digit sums, for three seeds each.

One training prompt in four is a sum of three numbers, which the start was never taught: as in real data, some prompts
are too hard to learn from, and a critic can know which.

    python benchmarks/learn.py                              # all presets; `make learn`
    python benchmarks/learn.py --presets gspo ppo --seeds 0

Writes ``benchmarks/results/learn.json`` and a learning curve for each preset to ``docs/images/learn/``; exits with 1
where a target is missed: held-out accuracy (greedy, exact match) rises by at least 0.2 for at least 2 of 3 seeds, each
run in at most 90 s, and PPO's critic explains more than 0.3 of the returns' variance (mean of the last 4 iterations).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "examples" / "quickstart"
RESULTS = HERE / "results" / "learn.json"
PICTURES = HERE.parent / "docs" / "images" / "learn"
PAGE = HERE.parent / "docs" / "algorithms" / "README.md"
SEEDS = (0, 1, 2)
ITERATIONS, EVERY, HELD_OUT = 20, 4, 300
ACCURACY, EXPLAINED = "val/reward/exact_match/mean", "value/explained_variance"
SECONDS, RISE, LEARNED_SEEDS, EXPLAINED_AT_LEAST = 90.0, 0.2, 2, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/learn"))
    parser.add_argument("--presets", nargs="*", default=presets())
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        reinforce(options.root, options.only, options.seeds[0], options.iterations)
        return
    start(options.root)
    pairs = [(preset, seed) for preset in options.presets for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda pair: measure(options.root, *pair, options.iterations), pairs))
    found: dict[str, dict[str, Any]] = {}
    for (preset, seed), run in zip(pairs, runs):
        found.setdefault(preset, {})[str(seed)] = run
    save(found)
    sys.exit("\n".join(missed(found)) or 0)


def presets() -> list[str]:
    from lightrft.algorithms import PRESETS

    return list(PRESETS)


# --- the start, shared by all runs ------------------------------------------------------------------------------------


def start(root: Path, steps: int = 500) -> None:
    """Data, and a model taught by a careless teacher, under ``root``; nothing where it is there already."""
    if (root / "supervised" / "huggingface" / "config.json").exists():
        return
    sys.path.insert(0, str(QUICKSTART))
    import arithmetic
    import run

    arithmetic.write(root, seed=0, short=False)
    write_hard_prompts(root / "hard.jsonl")
    run.supervised(argparse.Namespace(task="text", root=root, seed=0, short=False), {"trainer.max_steps": steps})


def write_hard_prompts(path: Path, count: int = 1000) -> None:
    rng = random.Random(0)
    sums = [[rng.randrange(10, 100) for _ in range(3)] for _ in range(count)]
    records = [{"input": "+".join(map(str, s)) + "=", "reference": str(sum(s)), "label": "exact_match"} for s in sums]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


# --- one run ----------------------------------------------------------------------------------------------------------


def measure(root: Path, preset: str, seed: int, iterations: int = ITERATIONS) -> dict[str, Any]:
    """One run in a process of its own, with one thread: its curve and its seconds."""
    command = [sys.executable, __file__, "--root", str(root), "--only", preset, "--seeds", str(seed)]
    command += ["--iterations", str(iterations)]
    began = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    curve = read_curve(root / preset / str(seed) / "version_0" / "metrics.csv", ACCURACY)
    result = {"before": curve[0], "after": curve[iterations], "seconds": round(seconds, 1), "held_out_accuracy": curve}
    if preset == "ppo":
        result["explained_variance"] = read_curve(root / preset / str(seed) / "version_0" / "metrics.csv", EXPLAINED)
    print(f"{preset:30s} seed {seed}: {result['before']:.3f} -> {result['after']:.3f} in {seconds:.0f} s", flush=True)
    return result


def reinforce(root: Path, preset: str, seed: int, iterations: int) -> None:
    """So many iterations of a preset from the start, its metrics under ``root/preset/seed``."""
    import shutil

    import torch

    from lightrft import RFTModule, RFTTrainer, Sampling
    from lightrft.callbacks import Rollout, Validation, WeightSync
    from lightrft.data import PromptData, Source
    from lightrft.engines import TransformersEngine
    from lightrft.lightning_modules import ActorModule, CriticModule

    folder, weights = root / preset / str(seed), str(root / "supervised" / "huggingface")
    shutil.rmtree(folder, ignore_errors=True)
    actor = ActorModule(weights, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=0.0))
    critic = None
    if preset == "ppo":
        critic = CriticModule(
            weights, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-4, weight_decay=0.0), warmup_iterations=2
        )
    trainer = RFTTrainer(
        accelerator="cpu",
        devices=1,
        callbacks=[
            Rollout(TransformersEngine(), Sampling(max_new_tokens=8)),
            WeightSync(),
            Validation(every_n_iterations=EVERY),
        ],
        default_root_dir=str(folder),
        max_iterations=iterations,
        prompts_per_iteration=32,
        samples_per_prompt=16,
        responses_per_update=256,
        epochs_per_iteration=2 if preset == "ppo" else 1,
        limit_val_prompts=HELD_OUT,
        seed=seed,
    )
    train = [Source(str(root / "train.jsonl"), probability=0.75), Source(str(root / "hard.jsonl"), probability=0.25)]
    data = PromptData(train=train, val=Source(str(root / "held_out.jsonl")))
    trainer.fit(RFTModule(actor, preset, critic=critic), data)


def read_curve(path: Path, name: str) -> dict[int, float]:
    """A metric by iteration, where it was measured."""
    with path.open() as file:
        return {int(row["step"]): round(float(row[name]), 4) for row in csv.DictReader(file) if row[name]}


# --- what came of it --------------------------------------------------------------------------------------------------


def missed(found: dict[str, dict[str, Any]]) -> list[str]:
    """Targets that these runs do not reach."""
    failures = []
    for preset, runs in found.items():
        learned = [run for run in runs.values() if run["after"] - run["before"] >= RISE]
        if len(learned) < min(LEARNED_SEEDS, len(runs)):
            failures.append(f"{preset}: {len(learned)} of {len(runs)} seeds rose by {RISE}")
        failures += [f"{preset}: took {run['seconds']} s" for run in runs.values() if run["seconds"] > SECONDS]
        for run in runs.values():
            last = list(run.get("explained_variance", {0: 1.0}).values())[-4:]
            if not sum(last) / len(last) > EXPLAINED_AT_LEAST:
                failures.append(f"{preset}: explained variance ends at {last}")
    return failures


def save(found: dict[str, dict[str, Any]]) -> None:
    import torch

    before = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "torch": torch.__version__}
    runs = {preset: {**before, **found}[preset] for preset in presets() if preset in {**before, **found}}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    write_table()
    for preset in found:
        draw(preset, runs[preset])


def write_table() -> None:
    """Put what ``RESULTS`` holds between the marks in ``PAGE``."""
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition("<!-- learn -->\n")
    _, end, after = rest.partition("<!-- /learn -->")
    PAGE.write_text(before + mark + table(json.loads(RESULTS.read_text())) + end + after, encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """Markdown: for each preset the held-out accuracy before and, seed by seed, after."""
    machine, rows = results["machine"], []
    for preset, runs in results["runs"].items():
        before = " ".join(dict.fromkeys(f"{run['before']:.2f}" for run in runs.values()))
        after = " ".join(f"{run['after']:.2f}" for run in runs.values())
        slowest = max(run["seconds"] for run in runs.values())
        rows.append(f"| [`{preset}`]({preset}.md) | {before} | {after} | {slowest:.0f} |")
    return (
        f"Held-out accuracy ({HELD_OUT} sums, greedy, exact match) before and after {ITERATIONS} iterations,\n"
        "a number a seed, and the seconds of the slowest run, on one thread\n"
        f"({machine['cores']} cores, torch {machine['torch']}).\n\n"
        "| preset | before | after | seconds |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def draw(preset: str, runs: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 2.8), dpi=120)
    for seed, run in runs.items():
        curve = {int(step): value for step, value in run["held_out_accuracy"].items()}
        (line,) = axes.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=f"seed {seed}")
        if explained := run.get("explained_variance"):
            steps, label = list(map(int, explained)), "explained variance\nof the critic" if seed == "0" else None
            axes.plot(steps, list(explained.values()), linestyle=":", color=line.get_color(), label=label)
    axes.set(xlabel="iteration", ylabel="held-out accuracy", ylim=(0, 1))
    axes.set_title(f"{preset}: two-digit addition, {HELD_OUT} held-out sums, greedy", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"{preset}.png")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
