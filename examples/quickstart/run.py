"""The main job on a CPU, from nothing: make data, teach by examples, improve by rewards, show what came of it.

    python examples/quickstart/run.py                  # under 8 minutes on 2 cores; `make quickstart` runs this
    python examples/quickstart/run.py --task vision    # questions about images; `make quickstart-vision`
    python examples/quickstart/run.py --task audio     # questions about sounds; `make quickstart-audio`
    python examples/quickstart/run.py --short          # the same steps, a few iterations each: does everything run?

Both trainings are the ``lightrft`` commands printed on the way; nothing here knows more than a user's shell.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"
# What a task is called in commands and configurations, and the file that makes its world.
TASKS = {"text": "arithmetic", "vision": "shapes", "audio": "tones"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="text")
    parser.add_argument("--root", type=Path, help="folder of everything that is made; by default in runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few iterations of each step")
    parser.add_argument("--control", action="store_true", help="rewards permuted across prompts: nothing to learn from")
    options = parser.parse_args()
    options.root = options.root or Path("runs") / f"quickstart{suffix(options.task, '-')}"
    start = time.perf_counter()
    made = importlib.import_module(TASKS[options.task]).write(options.root, options.seed, options.short)
    print(f"{made} under {options.root}")
    supervised(options)
    reinforce(options)
    report(options.root, time.perf_counter() - start)


def suffix(task: str, mark: str) -> str:
    """Of names that belong to a task; the text's are plain."""
    return "" if task == "text" else f"{mark}{task}"


def supervised(options: argparse.Namespace, further: dict[str, object] | None = None) -> None:
    root = options.root
    overrides = {
        "seed_everything": options.seed,
        **untrained(options.task, root),
        "data.train.path": root / "lessons.jsonl",
        "trainer.default_root_dir": root / "supervised",
        "trainer.logger.init_args.save_dir": root / "supervised",
        "trainer.callbacks.dirpath": root / "supervised" / "huggingface",
    }
    if options.short:
        overrides["trainer.max_steps"] = 10
    lightrft("supervised fit", configs(options.task, "_supervised"), overrides | (further or {}))


def untrained(task: str, root: Path) -> dict[str, object]:
    """Text's model is a configuration with a tokenizer; the others are a folder."""
    return {"model.tokenizer": root / "tokenizer"} if task == "text" else {"model.model": root / "untrained"}


def reinforce(options: argparse.Namespace) -> None:
    root = options.root
    overrides = {
        "seed_everything": options.seed,
        "model.actor.init_args.model": root / "supervised" / "huggingface",
        "data.train.path": root / "train.jsonl",
        "data.val.path": root / "held_out.jsonl",
        "trainer.default_root_dir": root / "rl",
    }
    if options.short:
        overrides |= {"trainer.max_iterations": 3, "trainer.limit_val_prompts": 100}
    if options.control:
        overrides["trainer.callbacks+"] = "permuted_rewards.PermutedRewards"
    lightrft("fit", configs(options.task), overrides)


def configs(task: str, step: str = "") -> list[str]:
    """The text's configuration of a step, and over it what the task has otherwise."""
    return list(dict.fromkeys(f"quickstart{suffix(one, '_')}{step}.yaml" for one in ("text", task)))


def lightrft(command: str, configs: list[str], overrides: dict[str, object]) -> None:
    """Run a ``lightrft`` command and stop with it where it fails."""
    arguments = command.split()
    for config in configs:
        arguments += ["--config", str(CONFIGS / config)]
    arguments += [f"--{key}={value}" for key, value in overrides.items()]
    print("\n$ lightrft " + " ".join(arguments), flush=True)
    here = Path(__file__).parent
    paths = [str(here), os.environ.get("PYTHONPATH", "")]  # here: the control's rewards
    environment = {
        # Threads that spin while another program holds a core make every step several times slower.
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = subprocess.Popen([sys.executable, "-m", "lightrft.cli", *arguments], env=environment)
    while True:
        try:
            status = command.wait()
            break
        except KeyboardInterrupt:
            pass  # the command got it too, and saves a checkpoint before it ends
    if status:
        sys.exit(status)


def report(root: Path, seconds: float) -> None:
    """The whole job's table and ``summary.json``, learning curve included."""
    newest = max((root / "rl").glob("version_*/summary.json"), key=lambda path: path.stat().st_mtime_ns)
    summary = json.loads(newest.read_text()) | {"seconds": round(seconds, 1)}
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    rows = {
        "held-out accuracy before": f"{summary['accuracy_before']:.3f}",
        "held-out accuracy after": f"{summary['accuracy_after']:.3f}",
        "seconds, all steps": f"{seconds:.0f}",
        "response tokens a second": f"{summary['tokens_per_second']:.0f}",
        "metrics": newest.parent / "metrics.csv",
        "trajectories": newest.parent / "trajectories",
        "checkpoint": max((newest.parent / "checkpoints").iterdir()),
        "model, for lightrft chat": newest.parent / "huggingface",
        "summary": root / "summary.json",
    }
    print("\n" + "\n".join(f"  {name:26s}{value}" for name, value in rows.items()))


if __name__ == "__main__":
    main()
