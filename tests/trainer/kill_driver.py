"""Runs, kills and resumes a tiny run at every phase boundary, each in a process of its own; prints what differed.

One parent imports everything once and forks; with one thread and no engine of its own a fork is safe here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_run
import torch

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import RFTCheckpoint, Throughput, TrajectoryWriter, Validation, WeightSync
from lightrft.checkpoint import manifest

torch.set_num_threads(1)
BOUNDARIES = 18  # three iterations of rollout, score, advantages, two updates, end


class KillAfterSaving(RFTCheckpoint):
    """SIGKILL when the checkpoint of the n-th boundary is written."""

    def __init__(self, boundary: int, asynchronous: bool = False) -> None:
        super().__init__(every_n_iterations=1, at="phase")
        self.asynchronous = asynchronous
        self.boundary = boundary

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        super().on_phase_end(trainer, pl_module, phase)
        self.boundary -= 1
        if self.boundary == 0:
            _kill()


class KillInTheBackground(KillAfterSaving):
    """SIGKILL while the n-th boundary's checkpoint is being written and the loop goes on.

    Attributes:
        step: what the background never comes back from.
    """

    step: str

    def __init__(self, boundary: int) -> None:
        super().__init__(boundary, asynchronous=True)

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        if self.boundary == 1:
            self._wait()  # the earlier one is not the one to be killed
            mock.patch.object(manifest, self.step, _kill).start()
        self.boundary -= self.boundary != 1
        RFTCheckpoint.on_phase_end(self, trainer, pl_module, phase)


class KillWhileWriting(KillInTheBackground):
    """Weights and loop are written, nothing says how they should read."""

    step = "sums_of"


class KillBeforeNaming(KillInTheBackground):
    """All is written, under the hidden name."""

    step = "text_of"


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], None]) -> int:
    """Run in a child; its exit status."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# What has state of its own: a critic with its optimizer, running moments of rewards, a refill that draws prompts while
# it scores, groups in flight.
ALGORITHMS: dict[str, Callable[[], Algorithm | None]] = {
    "grpo": lambda: None,
    "ppo": lambda: Algorithm("ppo", normalize_rewards=True, clip_rewards=1.5),
    "dapo": lambda: Algorithm("dapo", kl="loss_k3", normalize_rewards=True, clip_rewards=1.5),
    "partial": lambda: Algorithm(correction="token_tis"),
    "ahead": lambda: Algorithm("dapo", correction="token_tis"),
}


def run(inputs: Path, root: Path, name: str, callbacks: list[RFTCallback], ckpt_path: str | None = None) -> None:
    reward = tiny_run.shortness_of_odd_sums if name in ("dapo", "ahead") else tiny_run.shortness
    model = tiny_run.module(inputs, ALGORITHMS[name](), tiny_run.scoring(reward))
    usual: list[RFTCallback] | None = None
    if name in ("partial", "ahead"):
        rollout = tiny_run.partial() if name == "partial" else tiny_run.ahead()
        usual = [rollout, WeightSync(), Throughput(), Validation(every_n_iterations=2), TrajectoryWriter(1, True)]
    tiny_run.fit(inputs, root, callbacks, usual, model, ckpt_path)


def final_state(root: Path) -> dict[str, Any]:
    """Weights, optimizer and loop of the last checkpoint, but for how long things took."""
    folder = max(root.glob("version_*/checkpoints/iteration-000003"), key=lambda path: path.stat().st_mtime_ns)
    models = [file.parent for file in folder.rglob(".metadata")]
    state = {str(model.relative_to(folder)): tiny_run.saved_state(model) for model in models}
    loop = state["loop"] = torch.load(folder / "rank-0.pt", weights_only=True)
    loop["metrics"] = {k: v for k, v in loop["metrics"].items() if not k.startswith(tiny_run.TIMINGS)}
    where = next(key for key in loop["callbacks"] if "Checkpoint" in key or "Saving" in key)
    loop["callbacks"].pop(where)  # folders, which differ
    for timing in ("seconds", "phases", "peaks", "sampling"):
        loop["callbacks"]["Throughput"].pop(timing)
    return state


def merged(root: Path) -> tuple[dict[int, Any], dict[str, str]]:
    """Metric rows and trajectories of the killed run and its resumption; the later one wins."""
    rows: dict[int, Any] = {}
    texts: dict[str, str] = {}
    for version in sorted(root.glob("version_*")):
        if (version / "metrics.csv").exists():
            rows |= tiny_run.rows(version)
        if (version / "trajectories").exists():
            texts |= tiny_run.trajectories(version)
    return rows, texts


def compare(base: Path, root: Path) -> list[str]:
    different = tiny_run.differences(final_state(base), final_state(root))
    for mine, theirs in zip(merged(base), merged(root)):
        different += tiny_run.differences(mine, theirs)
    return different


def main() -> None:
    inputs = Path(sys.argv[1])
    report = {}
    # All of the first two iterations, and the last of the third.
    cases = [("grpo", KillAfterSaving, n) for n in (*range(1, 13), BOUNDARIES - 1)]
    cases += [("grpo", kind, n) for kind, n in ((KillWhileWriting, 2), (KillWhileWriting, 9))]
    cases += [("grpo", kind, n) for kind, n in ((KillBeforeNaming, 5), (KillBeforeNaming, 12))]
    # Of the others in the second iteration alone: all of its phases.
    cases += [(name, KillAfterSaving, n) for name in ("ppo", "dapo", "partial", "ahead") for n in (7, 8, 9, 10, 12)]
    for algorithm in ALGORITHMS:
        base, again = inputs / algorithm, inputs / f"{algorithm}-again"
        for root in (base, again) if algorithm == "grpo" else (base,):
            assert forked(partial(run, inputs, root, algorithm, [tiny_run.checkpoints(at="phase")])) == 0
    report["determinism"] = compare(inputs / "grpo", inputs / "grpo-again")
    for algorithm, kind, boundary in cases:
        name = f"{algorithm}-{kind.__name__}-{boundary}"
        killed = forked(partial(run, inputs, inputs / name, algorithm, [kind(boundary)]))
        assert killed == -signal.SIGKILL, f"{name}: exit {killed}"
        resumed = forked(partial(run, inputs, inputs / name, algorithm, [tiny_run.checkpoints()], "last"))
        report[name] = compare(inputs / algorithm, inputs / name) if resumed == 0 else [f"exit {resumed}"]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
