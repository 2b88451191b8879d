"""What goes wrong within a run: it stops with one clear error or goes on without harm, and never silently."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import TrajectoryWriter, WeightSync
from lightrft.engines import EngineError, TransformersEngine
from lightrft.rewards import Component, FunctionReward, Reward, RewardError, RewardInput, Scorer
from lightrft.samples import Prompt, Response, Sampling
from lightrft.trainer import RFTTrainer

COLLECTIVES = ("all_reduce", "all_gather", "barrier", "broadcast")


class RaisesInIteration(RFTCallback):
    def __init__(self, iteration: int, hook: str) -> None:
        self.iteration, self.hook = iteration, hook

    def _maybe(self, trainer: RFTTrainer, hook: str) -> None:
        if hook == self.hook and trainer.progress.iteration == self.iteration:
            raise ZeroDivisionError(f"in {hook}")

    def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        self._maybe(trainer, "on_rollout_end")

    def on_update_end(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
        self._maybe(trainer, "on_update_end")


# Errors


def test_a_reward_that_raises_ends_the_run_without_a_collective_and_says_where_to_resume(
    inputs: Path, tmp_path: Path
) -> None:
    """A collective after the error would wait for ranks that never come."""
    calls = 0

    def reward(item: RewardInput) -> float:
        nonlocal calls
        calls += 1
        if calls <= 20:
            return tiny_run.shortness(item)
        trainer.fabric = mock.Mock(wraps=trainer.fabric, is_global_zero=True, loggers=trainer.loggers)
        raise ZeroDivisionError("no such answer")

    class Watch(RFTCallback):
        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            seen.append(stage)

    class Closing(Reward):
        def score(self, item: RewardInput) -> float:
            return 0.0

        def close(self) -> None:
            seen.append("reward closed")

    seen: list[str] = []
    engine = TransformersEngine()
    scorer = Scorer({"exact_match": [Component(FunctionReward(reward)), Component(Closing(), 0.0)]})
    usual = [Watch(), tiny_run.sampler(engine), WeightSync(), tiny_run.checkpoints()]
    trainer = tiny_run.trainer(tmp_path, usual=usual)
    with (
        pytest.warns(UserWarning, match=r"The run failed \(RewardError\).*--ckpt_path .*iteration-000001\."),
        pytest.raises(
            RewardError, match=r"Prompt 'train/\d+@0': FunctionReward raised ZeroDivisionError: no such answer"
        ),
    ):
        trainer.fit(tiny_run.module(inputs, scorer=scorer), tiny_run.data(inputs))
    called = {name for name, *_ in trainer.fabric.method_calls}  # type: ignore[attr-defined]
    assert not called & set(COLLECTIVES)
    assert seen == ["fit", "reward closed"]
    with pytest.raises(EngineError, match="closed"):
        engine.generate([], Sampling(), [])
    assert tiny_run.rows(trainer.log_dir).keys() == {1}  # and what was measured before is on the disk


@pytest.mark.parametrize("stage", ["on_exception", "teardown"])
def test_an_error_while_ending_hides_neither_the_first_nor_keeps_the_others_from_ending(
    inputs: Path, tmp_path: Path, stage: str
) -> None:
    class Broken(RFTCallback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            if stage == "on_exception":
                raise RuntimeError("while failing")

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage_is_teardown:
                raise RuntimeError("while failing")

    stage_is_teardown = stage == "teardown"
    engine = TransformersEngine()
    usual = [Broken(), tiny_run.sampler(engine), WeightSync(), RaisesInIteration(0, "on_rollout_end")]
    with (
        pytest.warns(UserWarning, match=rf"Broken\.{stage} raised RuntimeError: while failing"),
        pytest.raises(ZeroDivisionError, match="in on_rollout_end"),
    ):
        tiny_run.fit(inputs, tmp_path, usual=usual)
    with pytest.raises(EngineError, match="closed"):
        engine.generate([], Sampling(), [])


def test_an_error_in_teardown_alone_is_raised(inputs: Path, tmp_path: Path) -> None:
    class Broken(RFTCallback):
        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            raise RuntimeError("cannot end")

    with pytest.warns(UserWarning, match="cannot end"), pytest.raises(RuntimeError, match="cannot end"):
        tiny_run.fit(inputs, tmp_path, [Broken()], max_iterations=1)


def test_a_run_that_failed_midway_resumes_to_the_weights_of_one_that_did_not(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        failing = [RaisesInIteration(1, "on_update_end"), tiny_run.checkpoints(at="phase")]
        tiny_run.fit(inputs, tmp_path, failing)
    resumed = tiny_run.fit(inputs, tmp_path, ckpt_path="last")
    whole = tiny_run.fit(inputs, tmp_path / "whole")
    assert tiny_run.differences(tiny_run.weights(resumed), tiny_run.weights(whole)) == []


def test_after_a_resume_the_checkpoint_it_came_from_is_the_last_complete_one(inputs: Path, tmp_path: Path) -> None:
    first = tiny_run.fit(inputs, tmp_path, [tiny_run.checkpoints()], max_iterations=1)
    folder = first.checkpoint_callback.last_checkpoint  # type: ignore[union-attr]
    failing = [RaisesInIteration(1, "on_rollout_end"), tiny_run.checkpoints()]
    with pytest.warns(UserWarning, match=f"--ckpt_path {folder}"), pytest.raises(ZeroDivisionError):
        tiny_run.fit(inputs, tmp_path, failing, ckpt_path="last")


# Rewards that are no number


def sometimes_nan(item: RewardInput) -> float:
    return math.nan if len(item.response) % 2 else tiny_run.shortness(item)


def run_with(inputs: Path, root: Path, reward: Any, **policy: Any) -> tuple[RFTTrainer, list[dict[str, Any]]]:
    """Trajectories of the first iteration beside the run."""
    model = tiny_run.module(inputs, scorer=tiny_run.scoring(reward, **policy))
    usual = [tiny_run.sampler(), WeightSync(), TrajectoryWriter()]
    trainer = tiny_run.fit(inputs, root, usual=usual, model=model)
    assert trainer.progress.iteration == 3
    assert all(bool(tensor.isfinite().all()) for tensor in tiny_run.weights(trainer).values())
    text = tiny_run.trajectories(trainer.log_dir)["train-000001-rank0.jsonl"]
    return trainer, [json.loads(line) for line in text.splitlines()]


def counted(trainer: RFTTrainer) -> tuple[float, float, float, float]:
    row = tiny_run.rows(trainer.log_dir)[1]
    names = ("no_score", "not_finite", "dropped_responses", "dropped_groups")
    return tuple(float(row[f"scoring/{name}"]) for name in names)  # type: ignore[return-value]


def test_nan_rewards_raise(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"Prompt 'train/\d+@0': FunctionReward gave nan, which is no score; .*drop"):
        run_with(inputs, tmp_path, sometimes_nan)


def test_nan_rewards_drop_their_response(inputs: Path, tmp_path: Path) -> None:
    trainer, lines = run_with(inputs, tmp_path, sometimes_nan, on_no_score="drop_response")
    odd = [bool(len(line["response"]) % 2) for line in lines]
    assert [line["dropped"] for line in lines] == odd and 0 < sum(odd) < 16
    assert counted(trainer) == (sum(odd), sum(odd), sum(odd), 0.0)
    row = tiny_run.rows(trainer.log_dir)[1]
    assert float(row["responses"]) == 16 - sum(odd)
    kept = [line["reward"] for line in lines if not line["dropped"]]
    assert float(row["reward/mean"]) == pytest.approx(sum(kept) / len(kept))


def test_nan_rewards_drop_their_group(inputs: Path, tmp_path: Path) -> None:
    def one_is_nan(item: RewardInput) -> float:
        return sometimes_nan(item) if item.reference in ("2", "3", "4", "5", "6", "7") else tiny_run.shortness(item)

    trainer, lines = run_with(inputs, tmp_path, one_is_nan, on_no_score="drop_group")
    groups = [lines[start : start + 4] for start in range(0, 16, 4)]
    faulty = [any(line["reward"] is None for line in group) for group in groups]
    assert [[line["dropped"] for line in group] for group in groups] == [[one] * 4 for one in faulty]
    unscored = sum(line["reward"] is None for line in lines)
    assert unscored > 0 and counted(trainer) == (unscored, unscored, 4.0 * sum(faulty), sum(faulty))


def test_nan_rewards_get_the_configured_value(inputs: Path, tmp_path: Path) -> None:
    trainer, lines = run_with(inputs, tmp_path, sometimes_nan, on_no_score=-3.0)
    odd = [bool(len(line["response"]) % 2) for line in lines]
    assert [line["reward"] == -3.0 for line in lines] == odd and not any(line["dropped"] for line in lines)
    assert counted(trainer) == (sum(odd), sum(odd), 0.0, 0.0)


def test_an_iteration_of_which_every_response_is_dropped_does_no_harm(inputs: Path, tmp_path: Path) -> None:
    calls = 0

    def reward(item: RewardInput) -> float:
        nonlocal calls
        calls += 1
        return math.nan if 16 < calls <= 32 else tiny_run.shortness(item)

    class Watch(RFTCallback):
        def on_iteration_end(self, trainer: Any, pl_module: Any) -> None:
            held.append(tiny_run.weights(trainer))

    held: list[dict[str, Tensor]] = []
    model = tiny_run.module(inputs, scorer=tiny_run.scoring(reward, on_no_score="drop_response"))
    trainer = tiny_run.fit(inputs, tmp_path, usual=[tiny_run.sampler(), WeightSync(), Watch()], model=model)
    rows = tiny_run.rows(trainer.log_dir)
    assert [float(rows[step]["responses"]) for step in (1, 2, 3)] == [16.0, 0.0, 16.0]
    # Without a gradient no step is taken: Adam's momentum alone would move the weights.
    assert float(rows[2]["skipped_updates"]) == 2 and tiny_run.differences(held[0], held[1]) == []
    assert all(bool(tensor.isfinite().all()) for tensors in held for tensor in tensors.values())
    assert tiny_run.differences(held[1], held[2]) != []  # it learns on


# Gradients that are no number


class NaNOnce(Algorithm):
    """The loss of one optimizer step is not finite."""

    def __init__(self, step: int) -> None:
        super().__init__(kl_coefficient=0.05)
        self.left = step

    def loss(self, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(*args)
        return (loss * math.nan if self.left == 0 else loss), metrics


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted_and_changes_no_weight(
    inputs: Path, tmp_path: Path, clip: float | None
) -> None:
    algorithm = NaNOnce(step=3)

    class Watch(RFTCallback):
        def on_update_start(self, trainer: Any, pl_module: Any, batch: Any) -> None:
            before.update(tiny_run.weights(trainer))

        def on_update_end(self, trainer: Any, pl_module: Any, outputs: dict[str, float]) -> None:
            changed.append(tiny_run.differences(before, tiny_run.weights(trainer)) != [])
            versions.append(trainer.progress.weight_version)
            algorithm.left -= 1

    before: dict[str, Tensor] = {}
    changed: list[bool] = []
    versions: list[int] = []
    trainer = tiny_run.fit(
        inputs, tmp_path, [Watch()], model=tiny_run.module(inputs, algorithm=algorithm), gradient_clip_val=clip
    )
    assert changed == [True, True, True, False, True, True]
    assert versions == [1, 2, 3, 3, 4, 5]
    skipped = [float(row.get("skipped_updates", 0)) for row in tiny_run.rows(trainer.log_dir).values()]
    assert skipped == [0.0, 0.0, 1.0, 0.0]  # validation at the start, three iterations
    assert all(bool(tensor.isfinite().all()) for tensor in tiny_run.weights(trainer).values())


def test_a_skipped_step_leaves_schedule_and_optimizer_where_they_were(inputs: Path, tmp_path: Path) -> None:
    algorithm = NaNOnce(step=0)
    trainer = tiny_run.fit(
        inputs, tmp_path, usual=[tiny_run.sampler(), WeightSync()], model=tiny_run.module(inputs, algorithm=algorithm)
    )
    assert float(tiny_run.rows(trainer.log_dir)[3]["skipped_updates"]) == 2
    assert trainer.learner.policy.optimizer.state_dict()["state"] == {}
    assert trainer.learner.policy.scheduler.last_epoch == 0
    assert trainer.progress.weight_version == 0


# Responses of no text


class Quiet(TransformersEngine):
    """Ends every response at once, and gives up on ``aborts`` of each group; on probes only the latter."""

    def __init__(self, aborts: int) -> None:
        super().__init__()
        self.aborts = aborts

    def generate(self, prompts: list[Prompt], *args: Any) -> list[list[Response]]:
        groups = super().generate(prompts, *args)
        for prompt, group in zip(prompts, groups):
            for index, response in enumerate(group):
                if prompt.uid.startswith("probe/") and index >= self.aborts:
                    continue
                length = int(index >= self.aborts)
                response.token_ids = torch.full((length,), 1)  # the end of the sequence, or nothing
                response.log_probs, response.text = torch.full((length,), -2.0), ""
                response.finish_reason = "stop" if length else "abort"
        return groups


@pytest.mark.parametrize("aborts", [0, 2, 4])
def test_empty_and_aborted_responses_do_no_harm(inputs: Path, tmp_path: Path, aborts: int) -> None:
    usual = [tiny_run.sampler(Quiet(aborts)), WeightSync(), TrajectoryWriter()]
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual)
    text = tiny_run.trajectories(trainer.log_dir)["train-000003-rank0.jsonl"]
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["response_tokens"] for line in lines] == 4 * ([0] * aborts + [1] * (4 - aborts))
    assert {line["response"] for line in lines} == {""}
    row = tiny_run.rows(trainer.log_dir)[3]
    assert float(row["scoring/aborted"]) == float(row["scoring/dropped_responses"]) == 4 * aborts
    assert float(row["tokens"]) == 16 - 4 * aborts
    assert math.isfinite(float(row["loss"])) if aborts < 4 else float(row["skipped_updates"]) == 2
    assert all(bool(tensor.isfinite().all()) for tensor in tiny_run.weights(trainer).values())
