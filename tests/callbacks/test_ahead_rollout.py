"""The engine samples the next iteration's responses while this one's are learned from, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import AheadRollout, EngineSleepWake, TrajectoryWriter, Validation, WeightSync
from lightrft.engines import TransformersEngine
from lightrft.samples import Prompt, Response, Rollout, Sampling
from lightrft.trainer import RFTTrainer

CONFIG = tiny_run.QWEN2 | {"num_key_value_heads": 2}


class Watch(RFTCallback):
    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def on_rollout_end(self, trainer: RFTTrainer, pl_module: Any, rollout: Rollout) -> None:
        self.rollouts.append(rollout)


class Calls(tiny_run.BesideTraining):
    """Counts prompts asked for in training, in the main thread and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.beside: list[int] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        if threading.current_thread() is not threading.main_thread():
            self.beside.append(len(prompts))
        return super().generate(prompts, sampling, seeds)


def run(
    inputs: Path,
    root: Path,
    rollout: AheadRollout,
    *callbacks: RFTCallback,
    algorithm: str = "grpo",
    ckpt_path: str | None = None,
    **options: Any,
) -> RFTTrainer:
    reward = tiny_run.shortness_of_odd_sums if algorithm == "dapo" else tiny_run.shortness
    chosen = Algorithm(algorithm, correction="token_tis")
    model = tiny_run.module(inputs, chosen, tiny_run.scoring(reward), config=CONFIG)
    usual = [rollout, WeightSync(), Validation(2), TrajectoryWriter(1, True)]
    return tiny_run.fit(inputs, root, callbacks, usual, model, ckpt_path, **options)


def uids(rollouts: Sequence[Rollout]) -> list[str]:
    return [prompt.uid for rollout in rollouts for prompt in rollout.prompts]


def test_an_iteration_trains_on_what_the_weights_before_it_answered(inputs: Path, tmp_path: Path) -> None:
    watch, engine = Watch(), Calls()
    trainer = run(inputs, tmp_path, tiny_run.ahead(engine), watch)
    stream = tiny_run.data(inputs)
    stream.attach(trainer.model.tokenizer, trainer.seed, 0, 1, 59)
    stream.setup("fit")
    assert uids(watch.rollouts) == [prompt.uid for prompt in stream.train_dataloader().take(3 * 4)]
    versions = [{response.weight_version for _, response in rollout} for rollout in watch.rollouts]
    assert versions == [{0}, {0}, {2}]  # two updates an iteration
    rows = tiny_run.rows(trainer.log_dir)
    for name in ("rollout/staleness_mean", "rollout/staleness_max"):
        assert [float(rows[step][name]) for step in (1, 2, 3)] == [0, 2, 2]
    assert engine.beside == [4, 4, 4]  # after the last iteration nobody would need them


def test_the_trainer_learns_while_the_engine_samples(inputs: Path, tmp_path: Path) -> None:
    learning = threading.Event()

    class Slow(Calls):
        """After the first responses, further ones come only once the trainer computes with those there are."""

        def generate(self, *args: Any) -> list[list[Response]]:
            found = super().generate(*args)
            assert not self.beside[1:] or learning.wait(60)
            return found

    class Learning(RFTCallback):
        def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
            learning.clear()

        def on_update_start(self, trainer: Any, pl_module: Any, batch: Any) -> None:
            learning.set()

    usual = [tiny_run.ahead(Slow()), WeightSync(), Learning()]
    model = tiny_run.module(inputs, Algorithm(correction="token_tis"))
    assert tiny_run.fit(inputs, tmp_path, usual=usual, model=model).progress.iteration == 3


def test_an_error_of_the_thread_ends_the_run(inputs: Path, tmp_path: Path) -> None:
    class Dies(Calls):
        def generate(self, *args: Any) -> list[list[Response]]:
            found = super().generate(*args)
            if len(self.beside) == 2:
                raise RuntimeError("the engine is gone")
            return found

    watch = Watch()
    with pytest.raises(RuntimeError, match="the engine is gone"):
        run(inputs, tmp_path, tiny_run.ahead(Dies()), watch)
    assert len(watch.rollouts) == 1


def test_a_run_that_fails_waits_for_the_engine_before_it_closes_it(inputs: Path, tmp_path: Path) -> None:
    failing, closed = threading.Event(), []

    class Slow(Calls):
        def generate(self, *args: Any) -> list[list[Response]]:
            found = super().generate(*args)
            if len(self.beside) == 2:
                assert failing.wait(60)
                closed.append(self._model is None)
            return found

    class Fails(RFTCallback):
        def on_score_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
            raise ValueError("no reward")

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            failing.set()

    engine = Slow()
    with pytest.raises(ValueError, match="no reward"):
        run(inputs, tmp_path, tiny_run.ahead(engine), Fails())
    assert closed == [False] and engine._model is None


def test_a_longer_run_goes_on_with_the_prompts_that_nobody_answered(inputs: Path, tmp_path: Path) -> None:
    whole, first, second = Watch(), Watch(), Watch()
    run(inputs, tmp_path / "whole", tiny_run.ahead(), whole)
    run(inputs, tmp_path / "parts", tiny_run.ahead(), first, tiny_run.checkpoints(), max_iterations=2)
    run(inputs, tmp_path / "parts", tiny_run.ahead(), second, tiny_run.checkpoints(), ckpt_path="last")
    assert uids(first.rollouts) + uids(second.rollouts) == uids(whole.rollouts)
    assert {response.weight_version for _, response in second.rollouts[0]} == {4}  # at once, with the current weights


def test_it_draws_nothing_from_the_generators_that_training_uses(inputs: Path, tmp_path: Path) -> None:
    class Generators(RFTCallback):
        def __init__(self) -> None:
            self.states: list[torch.Tensor] = []

        def on_update_end(self, trainer: Any, pl_module: Any, outputs: Any) -> None:
            self.states.append(torch.get_rng_state())

    generators = Generators()
    run(inputs, tmp_path, tiny_run.ahead(), generators)
    assert len(generators.states) == 6
    assert all(torch.equal(state, generators.states[0]) for state in generators.states)


def test_a_refill_takes_what_was_sampled_ahead(inputs: Path, tmp_path: Path) -> None:
    watch = Watch()
    trainer = run(inputs, tmp_path, tiny_run.ahead(), watch, algorithm="dapo")
    assert len(watch.rollouts) > 3
    stream = tiny_run.data(inputs)
    stream.attach(trainer.model.tokenizer, trainer.seed, 0, 1, 59)
    stream.setup("fit")
    taken = uids(watch.rollouts)
    assert taken == [prompt.uid for prompt in stream.train_dataloader().take(len(taken))]


# --- ranks ------------------------------------------------------------------------------------------------------------


def on_some_ranks(inputs: Path, root: Path, size: int, span: int, algorithm: str) -> dict[str, Any]:
    engine = tiny_run.BesideTraining(tensor_parallel_size=span)
    options = {"devices": size, "prompts_per_iteration": 8, "responses_per_update": 16, "limit_val_prompts": 1}
    trainer = run(inputs, root, tiny_run.ahead(engine), algorithm=algorithm, timeout_seconds=60, **options)
    weights = {name: weight.tolist() for name, weight in tiny_run.weights(trainer).items()}
    return {"log_dir": trainer.log_dir, "weights": weights}


@pytest.mark.parametrize(("size", "span", "algorithm"), [(2, 1, "dapo"), (4, 2, "remax")])
def test_a_run_is_the_same_on_any_number_of_ranks(
    inputs: Path, tmp_path: Path, size: int, span: int, algorithm: str
) -> None:
    one = on_some_ranks(inputs, tmp_path / "one", 1, 1, algorithm)
    many = ranks.on_ranks(size, on_some_ranks, inputs, tmp_path / "many", size, span, algorithm)
    assert tiny_run.responses(Path(many[0]["log_dir"])) == tiny_run.responses(Path(one["log_dir"]))
    for rank in many:
        for weight, values in rank["weights"].items():
            torch.testing.assert_close(torch.tensor(values), torch.tensor(one["weights"][weight]), rtol=0, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_engine_in_the_trainers_process_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TransformersEngine computes in the trainer's process; choose"):
        run(inputs, tmp_path, tiny_run.ahead(TransformersEngine()))


def test_an_engine_that_is_put_to_sleep_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="EngineSleepWake would put it to sleep"):
        run(inputs, tmp_path, tiny_run.ahead(), EngineSleepWake())
