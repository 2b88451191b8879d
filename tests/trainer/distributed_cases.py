"""Whole runs on several gloo ranks under every strategy, against the run of a single process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.strategies import Strategy
from ranks import on_ranks
from torch import Tensor
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.samples import Rollout
from lightrft.strategies import FSDP2, STRATEGIES

TOLERANCE = 1e-5
ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "grpo": lambda: Algorithm(kl_coefficient=0.05),
    "ppo": lambda: Algorithm("ppo"),
}
KINDS: dict[str, Callable[[], Strategy]] = {
    **{name: STRATEGIES[name] for name in ("ddp", "fsdp2")},
    "hsdp": partial(FSDP2, replicas=2),
    **{name: STRATEGIES[name] for name in ("zero1", "zero2", "zero3")},
}
RANKS, DEGREES = (1, 2, 4), (1, 2)


@dataclass(frozen=True)
class Cell:
    """A run.

    Attributes:
        algorithm: of :data:`ALGORITHMS`.
        strategy: of :data:`KINDS`; ``None`` is the single process without a process group.
        ranks: how many.
        degree: of sequence parallelism.
    """

    algorithm: str
    strategy: str | None
    ranks: int
    degree: int = 1

    @property
    def impossible(self) -> str | None:
        """Why there is no such run."""
        if self.degree > self.ranks:
            return "fewer ranks than share a sequence"
        return "fewer ranks than replicas" if self.strategy == "hsdp" and self.ranks < 2 else None


@dataclass
class Outcome:
    """What a run ended with.

    Attributes:
        weights: of actor and critic after three iterations, whole.
        said: by iteration, prompt and sample: tokens and reward.
        metrics: of the last iteration, but for timings.
    """

    weights: dict[str, Tensor]
    said: dict[tuple[int, str, int], tuple[list[int], float]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """A run's from the single process's.

    Attributes:
        weights: largest of any weight.
        tokens: whether a token is another.
        rewards: largest of any response's reward.
        metrics: largest of any metric's, in proportion where that is above 1.
    """

    weights: float
    tokens: bool
    rewards: float
    metrics: float

    @property
    def small(self) -> bool:
        return self.weights <= TOLERANCE and not self.tokens and self.rewards <= 1e-12 and self.metrics <= 1e-4


def cells() -> list[Cell]:
    """Every combination, impossible ones too."""
    return [Cell(a, s, r, d) for a in ALGORITHMS for s in KINDS for r in RANKS for d in DEGREES]


def compare(chosen: Iterable[Cell]) -> Iterable[tuple[Cell, Difference]]:
    """Run every cell, and for each algorithm the single process that it is compared with."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = tiny_run.write_inputs(Path(folder))
        alone: dict[str, Outcome] = {}
        for cell in chosen:
            if cell.algorithm not in alone:
                alone[cell.algorithm] = _outcome(inputs, Cell(cell.algorithm, None, 1))
            yield cell, _difference(alone[cell.algorithm], _outcome(inputs, cell))


def _outcome(inputs: Path, cell: Cell) -> Outcome:
    found = on_ranks(cell.ranks, _run, str(inputs), cell)
    said = {key: value for one in found for key, value in one.said.items()}
    return Outcome(found[0].weights, said, found[0].metrics)


class _Listen(RFTCallback):
    def __init__(self) -> None:
        self.said: dict[tuple[int, str, int], tuple[list[int], float]] = {}

    def on_score_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
        for prompt, group in zip(rollout.prompts, rollout.groups):
            for sample, response in enumerate(group):
                key = (trainer.progress.iteration, prompt.uid, sample)
                self.said[key] = (response.token_ids.tolist(), float(response.reward))


def _run(inputs: str, cell: Cell) -> Outcome:
    listening = _Listen()
    model = tiny_run.module(Path(inputs), ALGORITHMS[cell.algorithm]())
    trainer = tiny_run.fit(
        Path(inputs),
        Path(inputs) / "runs",
        [listening],
        model=model,
        devices=cell.ranks,
        strategy=KINDS[cell.strategy]() if cell.strategy else "auto",
        prompts_per_iteration=8,
        responses_per_update=16,
        sequence_parallel_size=cell.degree,
    )
    weights = {f"actor.{name}": weight.clone() for name, weight in model.export_parameters()}
    if model.critic is not None:
        weights |= {f"critic.{name}": weight for name, weight in tiny_run.whole_weights(model.critic).items()}
    skipped = (*tiny_run.TIMINGS, "balance/", "weight_sync/")
    metrics = {name: v for name, v in trainer.callback_metrics.items() if not name.startswith(skipped)}
    return Outcome(weights, listening.said, metrics)


def _difference(alone: Outcome, other: Outcome) -> Difference:
    assert alone.weights.keys() == other.weights.keys() and alone.said.keys() == other.said.keys()
    assert alone.metrics.keys() == other.metrics.keys()
    return Difference(
        weights=max(float((other.weights[name] - weight).abs().max()) for name, weight in alone.weights.items()),
        tokens=any(other.said[key][0] != tokens for key, (tokens, _) in alone.said.items()),
        rewards=max(abs(other.said[key][1] - reward) for key, (_, reward) in alone.said.items()),
        metrics=max(abs(other.metrics[name] - v) / max(1.0, abs(v)) for name, v in alone.metrics.items()),
    )
