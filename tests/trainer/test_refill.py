"""Dynamic sampling: groups of equal rewards are replaced by further prompts, in the order in which they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer import tiny_run

from lightrft.algorithms import Advantage, Algorithm
from lightrft.analysis import groups_with_spread
from lightrft.callback import RFTCallback
from lightrft.module import RFTModule
from lightrft.rewards import RewardInput
from lightrft.samples import Batch, Response, Rollout
from lightrft.trainer import RFTTrainer


class Watch(RFTCallback):
    """Keeps, by iteration, every rollout that was drawn, what was kept of them, and the batch made of it."""

    def __init__(self) -> None:
        self.drawn: dict[int, list[Rollout]] = {}
        self.kept: dict[int, Rollout] = {}
        self.batches: dict[int, Batch] = {}

    def on_rollout_end(self, trainer: RFTTrainer, pl_module: Any, rollout: Rollout) -> None:
        self.drawn.setdefault(trainer.progress.iteration, []).append(rollout)

    def on_score_end(self, trainer: RFTTrainer, pl_module: Any, rollout: Rollout) -> None:
        self.kept[trainer.progress.iteration] = rollout

    def on_advantages_end(self, trainer: RFTTrainer, pl_module: Any, batch: Batch) -> None:
        self.batches[trainer.progress.iteration] = batch


def dapo(inputs: Path, reward: Any = tiny_run.shortness_of_odd_sums, **axes: Any) -> RFTModule:
    return tiny_run.module(inputs, Algorithm("dapo", **axes), tiny_run.scoring(reward))


def run(inputs: Path, root: Path, model: RFTModule, *callbacks: RFTCallback, **options: Any) -> RFTTrainer:
    usual = [tiny_run.sampler(), tiny_run.WeightSync()]
    return tiny_run.fit(inputs, root, callbacks, usual, model, **options)


def uids(*rollouts: Rollout) -> list[str]:
    return [prompt.uid for rollout in rollouts for prompt in rollout.prompts]


def with_spread(*rollouts: Rollout) -> list[str]:
    return [uid for rollout in rollouts for uid, has in zip(uids(rollout), groups_with_spread(rollout)) if has]


def test_the_first_groups_that_differ_are_taken_in_the_order_of_their_draw(inputs: Path, tmp_path: Path) -> None:
    watch = Watch()
    trainer = run(inputs, tmp_path, dapo(inputs), watch)
    for iteration, drawn in watch.drawn.items():
        kept, batch = watch.kept[iteration], watch.batches[iteration]
        assert uids(kept) == with_spread(*drawn)[:4]
        assert all(groups_with_spread(kept)) and len(kept) == 16
        assert batch.response_mask.any(-1).all()
    # What is drawn is the order of prompts without a gap; each round draws whole updates of what is missing.
    stream = tiny_run.data(inputs)
    stream.attach(trainer.model.tokenizer, trainer.seed, 0, 1, 59)
    stream.setup("fit")
    everything = [rollout for drawn in watch.drawn.values() for rollout in drawn]
    assert uids(*everything) == [p.uid for p in stream.train_dataloader().take(len(uids(*everything)))]
    for drawn in watch.drawn.values():
        for number in range(1, len(drawn)):
            missing = 4 - len(with_spread(*drawn[:number]))
            assert len(drawn[number].prompts) == missing + missing % 2
    # Of three iterations at least one went several rounds, or nothing was tried here.
    assert max(len(drawn) for drawn in watch.drawn.values()) > 2


def test_the_metrics_count_rounds_prompts_and_all_that_was_sampled(inputs: Path, tmp_path: Path) -> None:
    watch = Watch()
    trainer = run(inputs, tmp_path, dapo(inputs), watch)
    for step, row in tiny_run.rows(trainer.log_dir).items():
        first, *further = watch.drawn[step - 1]
        assert float(row["refill/rounds"]) == len(further)
        assert float(row["refill/prompts"]) == len(uids(*further))
        assert float(row["refill/missing_groups"]) == 0
        without = 1 - len(with_spread(first, *further)) / len(uids(first, *further))
        assert float(row["groups_without_spread"]) == pytest.approx(without)
        rewards = torch.tensor([response.reward for drawn in (first, *further) for _, response in drawn])
        assert float(row["reward/mean"]) == pytest.approx(float(rewards.mean()))
        assert float(row["responses"]) == 16


def test_nothing_is_sampled_again_where_all_groups_differ(inputs: Path, tmp_path: Path) -> None:
    watch = Watch()
    # Half a token apart: no two responses of a group score alike.
    model = dapo(inputs, lambda item: hash_of(item.response))
    trainer = run(inputs, tmp_path, model, watch, max_iterations=1)
    (drawn,) = watch.drawn[0]
    assert watch.kept[0] is drawn
    row = tiny_run.rows(trainer.log_dir)[1]
    assert [float(row[f"refill/{name}"]) for name in ("rounds", "prompts", "missing_groups")] == [0, 0, 0]


def hash_of(text: str) -> float:
    return sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 97 / 97


def test_after_the_last_round_missing_groups_are_told_and_not_trained_on(inputs: Path, tmp_path: Path) -> None:
    watch = Watch()
    with pytest.warns(UserWarning, match=r"Iteration 1: \d of 4 groups still have equal rewards after refill_rounds=1"):
        trainer = run(inputs, tmp_path, dapo(inputs, refill_rounds=1, reward=one_prompt_in_three), watch)
    rows = tiny_run.rows(trainer.log_dir)
    missing = {step - 1: int(float(row["refill/missing_groups"])) for step, row in rows.items()}
    assert any(0 < count < 4 for count in missing.values())
    for iteration, count in missing.items():
        kept, batch, row = watch.kept[iteration], watch.batches[iteration], rows[iteration + 1]
        assert len(watch.drawn[iteration]) == 2 and len(kept.prompts) == 4
        spread = torch.tensor(groups_with_spread(kept))
        assert int(spread.sum()) == 4 - count
        # Both updates miss as many, give or take one, and no denominator counts what is missing.
        assert abs(int(spread[:2].sum()) - int(spread[2:].sum())) <= 1
        trained = batch.response_mask.any(-1)
        assert torch.equal(trained, spread.repeat_interleave(4))
        assert float(row["responses"]) == 4 * (4 - count)
        assert float(row["tokens"]) == int(batch.response_lengths[trained].sum())
        assert not batch.advantages[~trained].any() and batch.advantages[trained].any()


def one_prompt_in_three(item: RewardInput) -> float:
    return tiny_run.shortness(item) if int(item.reference or 0) % 3 == 0 else 0.0


def test_an_iteration_without_any_group_that_differs_skips_its_updates(inputs: Path, tmp_path: Path) -> None:
    model = dapo(inputs, refill_rounds=2, reward=lambda item: 1.0)
    with pytest.warns(UserWarning, match="4 of 4 groups still have equal rewards after refill_rounds=2"):
        trainer = run(inputs, tmp_path, model, max_iterations=1)
    row = tiny_run.rows(trainer.log_dir)[1]
    assert [float(row[name]) for name in ("responses", "skipped_updates", "refill/prompts")] == [0, 2, 8]


def test_dropping_instead_samples_nothing_further(inputs: Path, tmp_path: Path) -> None:
    watch = Watch()
    trainer = run(inputs, tmp_path, dapo(inputs, group_filter="drop"), watch)
    for step, row in tiny_run.rows(trainer.log_dir).items():
        (drawn,) = watch.drawn[step - 1]
        assert not any(name.startswith("refill/") for name in row)
        assert float(row["responses"]) == 4 * len(with_spread(drawn))


class AgainstGreedy(Advantage):
    """Wants both: groups that differ, and the greedy response."""

    per_response = compares_group = needs_greedy = True

    def __call__(self, batch: Batch, token_rewards: Tensor) -> Tensor:
        return (batch.rewards - batch.greedy_rewards)[:, None]


def test_the_greedy_response_stays_with_its_prompt(inputs: Path, tmp_path: Path) -> None:
    watch = Watch()
    run(inputs, tmp_path, dapo(inputs, advantage=AgainstGreedy()), watch)
    assert any(len(drawn) > 1 for drawn in watch.drawn.values())
    for iteration, drawn in watch.drawn.items():
        greedy: dict[str, Response] = {uid: one for part in drawn for uid, one in zip(uids(part), part.greedy)}
        kept, batch = watch.kept[iteration], watch.batches[iteration]
        assert len(kept.greedy) == len(kept.prompts) == 4
        for uid, one in zip(uids(kept), kept.greedy):
            assert torch.equal(one.token_ids, greedy[uid].token_ids) and one.reward == greedy[uid].reward is not None
        lengths = torch.tensor([len(greedy[uid].token_ids) for uid in uids(kept)])
        assert torch.equal(batch.greedy_lengths, lengths.repeat_interleave(4))


def test_every_prompt_has_its_greedy_response_without_a_filter(inputs: Path, tmp_path: Path) -> None:
    watch = Watch()
    run(inputs, tmp_path, tiny_run.module(inputs, Algorithm("remax")), watch, max_iterations=1)
    (drawn,) = watch.drawn[0]
    assert watch.kept[0] is drawn and len(drawn.greedy) == 4
    rewards = torch.tensor([one.reward for one in drawn.greedy]).repeat_interleave(4)
    assert torch.equal(watch.batches[0].greedy_rewards, rewards)


class Crash(RFTCallback):
    """Fails in the second iteration, once the checkpoint between sampling and scoring is written."""

    def on_phase_start(self, trainer: RFTTrainer, pl_module: Any, phase: str) -> None:
        if trainer.progress.iteration == 1 and phase == "score":
            raise RuntimeError("crashed")


def test_a_run_resumed_before_the_refill_is_the_uninterrupted_one(inputs: Path, tmp_path: Path) -> None:
    whole, resumed = Watch(), Watch()
    through = run(inputs, tmp_path / "whole", dapo(inputs), whole)
    with pytest.raises(RuntimeError, match="crashed"):
        run(inputs, tmp_path / "cut", dapo(inputs), Crash(), tiny_run.checkpoints(at="phase"))
    again = run(inputs, tmp_path / "cut", dapo(inputs), resumed, tiny_run.checkpoints(at="phase"), ckpt_path="last")
    assert len(whole.drawn[1]) > 1
    assert [uids(one) for one in resumed.drawn[1]] == [uids(one) for one in whole.drawn[1][1:]]
    for iteration in (1, 2):
        assert tiny_run.differences(resumed.kept[iteration].state_dict(), whole.kept[iteration].state_dict()) == []
    assert tiny_run.differences(tiny_run.weights(again), tiny_run.weights(through)) == []
    rows = tiny_run.rows(through.log_dir)
    assert {step: rows[step] for step in (2, 3)} == tiny_run.rows(again.log_dir)
