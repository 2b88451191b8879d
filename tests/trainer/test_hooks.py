"""Every hook fires in the documented order, none is mistyped, and a user adds behaviour outside the loop."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from trainer import tiny_run

from lightrft.callback import HOOKS, RFTCallback
from lightrft.callbacks import RFTCheckpoint, Throughput, Validation, WeightSync
from lightrft.trainer import RFTTrainer


def recorder(seen: list[str]) -> RFTCallback:
    """Writes down every hook, with its phase or part, and checks what it is given."""

    def recorded(hook: str) -> Callable[..., None]:
        declared = set(inspect.signature(getattr(RFTCallback, hook)).parameters) - {"self", "trainer", "pl_module"}

        def method(self: RFTCallback, *, trainer: RFTTrainer, pl_module: Any, **arguments: Any) -> None:
            assert trainer.model is pl_module and arguments.keys() == declared
            word = arguments.get("phase") or arguments.get("part")
            seen.append(f'{hook}("{word}")' if word else hook)

        return method

    return type("Recorder", (RFTCallback,), {hook: recorded(hook) for hook in HOOKS})()


def documented() -> list[str]:
    """The hooks of an iteration in the docstring of RFTCallback."""
    text = inspect.getdoc(RFTCallback) or ""
    return re.findall(r'\bon_\w+(?:\("\w+"\))?', text[text.index("::") : text.index("``on_phase_end`` is")])


def iterations(seen: list[str]) -> list[list[str]]:
    starts = [index for index, hook in enumerate(seen) if hook == "on_iteration_start"]
    ends = [*starts[1:], len(seen)]
    return [seen[start:end] for start, end in zip(starts, ends)]


def test_the_hooks_of_an_iteration_fire_in_the_documented_order(inputs: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    usual = [tiny_run.sampler(), WeightSync(), recorder(seen)]
    tiny_run.fit(inputs, tmp_path, usual=usual, responses_per_update=16, max_iterations=2)
    assert seen[:2] == ["setup", "on_fit_start"] and seen[-2:] == ["on_fit_end", "teardown"]
    first, second = iterations(seen[2:-2])
    assert first == second == documented()


def test_every_optimizer_step_is_an_update_phase(inputs: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    usual = [tiny_run.sampler(), WeightSync(), recorder(seen)]
    tiny_run.fit(inputs, tmp_path, usual=usual, max_iterations=1, epochs_per_iteration=2)
    expected = documented()
    start, end = expected.index('on_phase_start("update")'), expected.index('on_phase_end("update")') + 1
    assert seen[2:-2] == expected[:start] + 4 * expected[start:end] + expected[end:]


def test_every_hook_fires_in_some_run(inputs: Path, tmp_path: Path) -> None:
    class Failing(RFTCallback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("the end")

    seen: list[str] = []
    with pytest.raises(RuntimeError, match="the end"):
        tiny_run.fit(inputs, tmp_path, [recorder(seen), Failing()], max_iterations=1)
    assert {hook.partition("(")[0] for hook in seen} == HOOKS


# What is refused


def test_a_mistyped_hook_is_refused_with_the_one_that_was_meant(tmp_path: Path) -> None:
    class Mistyped(RFTCallback):
        def on_rolout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None: ...

    with pytest.raises(ValueError, match=r"Mistyped\.on_rolout_end .* never be called; did you mean on_rollout_end\?"):
        tiny_run.trainer(tmp_path, [Mistyped()])


def test_a_hook_of_lightning_that_has_no_moment_here_is_refused_with_those_that_have(tmp_path: Path) -> None:
    class Foreign(RFTCallback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None: ...

    with pytest.raises(ValueError, match=r"Foreign\.on_train_batch_end .* never be called; hooks are .*on_update_end"):
        tiny_run.trainer(tmp_path, [Foreign()])


def test_the_trainer_calls_only_hooks_that_are_declared(tmp_path: Path) -> None:
    trainer = tiny_run.trainer(tmp_path)
    for hook in ("on_rolout_end", "on_train_batch_end", "state_dict"):
        with pytest.raises(AttributeError, match=f"'{hook}' is no hook of RFTCallback"):
            trainer.call(hook)


def test_lightnings_own_callbacks_that_know_none_of_our_hooks_may_stand_in_the_list(
    inputs: Path, tmp_path: Path
) -> None:
    stages: list[str] = []

    class Stock(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            stages.append(stage)

    tiny_run.fit(inputs, tmp_path, [Stock()], max_iterations=1)  # type: ignore[list-item]
    assert stages == ["fit"]


def test_there_must_be_exactly_one_rollout_callback(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"exactly one rollout callback(.|\n)*class_path: lightrft\.callbacks\.Rollout"
    ):
        tiny_run.trainer(tmp_path, usual=[WeightSync()])
    with pytest.raises(ValueError, match="lists 2 of RolloutCallback; keep one"):
        tiny_run.trainer(tmp_path, usual=[tiny_run.sampler(), tiny_run.sampler()])


def test_a_second_checkpoint_callback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lists 2 of .*keep one"):
        tiny_run.trainer(tmp_path, [RFTCheckpoint(), RFTCheckpoint(every_n_iterations=3)])


def test_two_callbacks_whose_states_a_checkpoint_would_confuse_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lists 2 of Throughput, whose states a checkpoint could not tell apart"):
        tiny_run.trainer(tmp_path, [Throughput()])

    class Keyed(Validation):
        @property
        def state_key(self) -> str:
            return self._generate_state_key(temperature=self.temperature)

    tiny_run.trainer(tmp_path, [Keyed(), Keyed(temperature=1.0)])


# What a user adds


def test_ten_lines_of_a_user_change_the_rewards_log_a_metric_and_end_the_run(inputs: Path, tmp_path: Path) -> None:
    class Penalty(RFTCallback):
        """Half the reward of what was cut off, and an end once little is."""

        def on_score_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
            cut = [response for _, response in rollout if response.finish_reason == "length"]
            for response in cut:
                response.reward *= 0.5
            trainer.log("my/cut", len(cut))
            trainer.should_stop = trainer.progress.iteration == 1

    trainer = tiny_run.fit(inputs, tmp_path, [Penalty(), tiny_run.checkpoints()])
    rows = tiny_run.rows(trainer.log_dir)
    assert set(rows) == {0, 1} and float(rows[1]["my/cut"]) == 16 * float(rows[1]["truncated_fraction"])
    plain = tiny_run.fit(inputs, tmp_path / "plain", max_iterations=1)
    assert rows[1]["advantage/std"] != tiny_run.rows(plain.log_dir)[1]["advantage/std"]
    # The run ended at the next boundary, and was saved there.
    saved = trainer.checkpoint_callback.last_checkpoint  # type: ignore[union-attr]
    assert saved is not None and saved.name == "iteration-000001-before-advantages-0"


def test_a_checkpoint_callback_runs_last_wherever_it_is_listed(inputs: Path, tmp_path: Path) -> None:
    class Counter(RFTCallback):
        boundaries = 0

        def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
            self.boundaries += 1

        def state_dict(self) -> dict[str, Any]:
            return {"boundaries": self.boundaries}

    usual = [tiny_run.checkpoints(), tiny_run.sampler(), WeightSync(), Counter()]
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual, max_iterations=1)
    assert isinstance(trainer.callbacks[-1], RFTCheckpoint)
    state = torch.load(trainer.callbacks[-1].last_checkpoint / "rank-0.pt", weights_only=True)  # type: ignore[operator]
    (key,) = (name for name in state["callbacks"] if name.endswith("Counter"))
    assert state["callbacks"][key] == {"boundaries": 6}
