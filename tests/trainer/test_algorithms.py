"""What an algorithm needs of a run beyond its loss: a critic, greedy responses, a hot first token, metrics."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import Throughput, Validation, WeightSync
from lightrft.lightning_modules import CriticModule, LoRA
from lightrft.module import RFTModule
from lightrft.rewards import RewardInput
from lightrft.samples import FIRE, Batch, Rollout
from lightrft.trainer import RFTTrainer


class Weights(RFTCallback):
    """The actor's and the critic's weights, by iteration."""

    def __init__(self) -> None:
        self.actor: list[dict[str, Tensor]] = []
        self.critic: list[dict[str, Tensor]] = []

    def on_iteration_start(self, trainer: RFTTrainer, pl_module: Any) -> None:
        self._keep(trainer)

    def on_fit_end(self, trainer: RFTTrainer, pl_module: Any) -> None:
        self._keep(trainer)

    def _keep(self, trainer: RFTTrainer) -> None:
        self.actor.append(tiny_run.weights(trainer))
        self.critic.append({name: p.detach().clone() for name, p in trainer.model.critic.named_parameters()})


def changed(weights: list[dict[str, Tensor]]) -> list[bool]:
    return [tiny_run.differences(before, after) != [] for before, after in itertools.pairwise(weights)]


def ppo(inputs: Path, warmup_iterations: int = 0, **axes: Any) -> RFTModule:
    critic = CriticModule(
        config=tiny_run.QWEN2,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        warmup_iterations=warmup_iterations,
    )
    rewards = tiny_run.scoring(tiny_run.shortness)
    return RFTModule(tiny_run.actor(inputs), Algorithm("ppo", **axes), rewards, critic)


def test_only_the_critic_trains_while_it_warms_up(inputs: Path, tmp_path: Path) -> None:
    weights = Weights()
    trainer = tiny_run.fit(inputs, tmp_path, [weights], model=ppo(inputs, warmup_iterations=2))
    assert changed(weights.actor) == [False, False, True]
    assert changed(weights.critic) == [True, True, True]
    assert trainer.progress.weight_version == 2  # two updates of the third iteration
    assert trainer.learner.policy.scheduler.last_epoch == 2
    rows = tiny_run.rows(trainer.log_dir)
    assert "loss" not in rows[1] and "loss" in rows[3] and all("value/loss" in rows[step] for step in (1, 2, 3))


def test_actor_and_critic_are_clipped_and_scheduled_apart(inputs: Path, tmp_path: Path) -> None:
    trainer = tiny_run.fit(inputs, tmp_path, model=ppo(inputs), max_iterations=1)
    row = tiny_run.rows(trainer.log_dir)[1]
    assert float(row["value/learning_rate"]) == 1e-2 != float(row["learning_rate"])
    assert float(row["value/gradient_norm"]) != float(row["gradient_norm"])


def test_a_critic_and_the_algorithm_that_needs_it_go_together(inputs: Path) -> None:
    actor, critic = tiny_run.actor(inputs), CriticModule(config=tiny_run.QWEN2)
    with pytest.raises(ValueError, match=r"reads a critic's values; set model\.critic, e\.g\. \{class_path: Critic"):
        RFTModule(actor, "ppo")
    with pytest.raises(ValueError, match=r"no use for model\.critic; remove it"):
        RFTModule(actor, "grpo", critic=critic)


def test_a_critic_that_cannot_read_the_actors_tokens_is_refused(inputs: Path) -> None:
    critic = CriticModule(config=tiny_run.QWEN2 | {"vocab_size": 9})
    module = RFTModule(tiny_run.actor(inputs), "ppo", critic=critic)
    with pytest.raises(ValueError, match=r"The critic embeds 9 tokens, the actor can sample 14; give model\.critic a"):
        module.configure_model()


def test_without_a_score_for_the_greedy_response_its_group_is_dropped(inputs: Path, tmp_path: Path) -> None:
    class Watch(RFTCallback):
        def on_score_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
            for greedy, group in zip(rollout.greedy, rollout.groups):
                seen.append((greedy.reward is None, {response.dropped for response in group}))

    def reward(item: RewardInput) -> float | None:
        nonlocal calls
        calls += 1
        # Every rollout's greedy responses are scored after its 16 others; the first of the four has no score.
        return None if calls % 20 == 17 else tiny_run.shortness(item)

    calls, seen = 0, []  # type: ignore[var-annotated]
    model = tiny_run.module(inputs, Algorithm("remax"), tiny_run.scoring(reward, on_no_score="drop_response"))
    trainer = tiny_run.fit(inputs, tmp_path, [Watch()], [tiny_run.sampler(), WeightSync()], model)
    assert seen == 3 * [(True, {True}), (False, {False}), (False, {False}), (False, {False})]
    row = tiny_run.rows(trainer.log_dir)[1]
    assert float(row["responses"]) == 12 and float(row["scoring/no_score"]) == 1
    assert float(row["scoring/dropped_responses"]) == 4 and float(row["scoring/dropped_groups"]) == 1


def test_a_hot_first_token_is_not_corrected_and_validation_has_none(inputs: Path, tmp_path: Path) -> None:
    class Watch(RFTCallback):
        def on_advantages_end(self, trainer: Any, pl_module: Any, batch: Batch) -> None:
            batches.append(batch)

        def on_validation_rollout(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
            validated.append(rollout.sampling.fire)

    batches: list[Batch] = []
    validated: list[FIRE | None] = []
    usual = [tiny_run.sampler(fire=FIRE(temperature=20.0, top_k=4)), WeightSync(), Validation(), Watch()]
    model = tiny_run.module(inputs, Algorithm(correction="token_tis"))
    trainer = tiny_run.fit(inputs, tmp_path, usual=usual, model=model, max_iterations=1)
    (batch,) = batches
    first, mask = batch.response_mask[:, 0], batch.response_mask
    mismatch = (batch.log_probs_old - batch.log_probs_rollout).abs()
    assert float(mismatch[first, 0].min()) > 1e-3  # drawn from another distribution than the trainer's
    torch.testing.assert_close(batch.policy_weights[mask], torch.ones(int(mask.sum())), rtol=0, atol=1e-4)
    assert float(tiny_run.rows(trainer.log_dir)[1]["kl/rollout"]) < 1e-6
    assert validated and set(validated) == {None}


def test_lora_gives_actor_reference_and_critic_of_one_set_of_weights_each(inputs: Path, tmp_path: Path) -> None:
    lora = LoRA(rank=2, alpha=4.0)
    critic = CriticModule(config=tiny_run.QWEN2, lora=lora, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    rewards = tiny_run.scoring(tiny_run.shortness)
    module = RFTModule(tiny_run.actor(inputs, lora=lora, lr_scheduler=None), Algorithm("ppo"), rewards, critic)
    trainer = tiny_run.fit(inputs, tmp_path, model=module, responses_per_update=16)
    assert module.reference is None
    rows = tiny_run.rows(trainer.log_dir)
    # The reference is the base without the adapter, which starts at nothing.
    assert abs(float(rows[1]["kl/reference"])) < 1e-6 < abs(float(rows[3]["kl/reference"]))
    assert float(rows[3]["value/mean"]) != 0
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert all("lora" in name or name.startswith("head") for name in trained)


def test_another_algorithm_or_sampling_waits_for_the_end_of_an_iteration(inputs: Path, tmp_path: Path) -> None:
    first = tiny_run.fit(inputs, tmp_path, [tiny_run.checkpoints(at="phase", max_keep=9)], max_iterations=1)
    folders = {path.name: str(path) for path in (Path(first.log_dir) / "checkpoints").iterdir()}
    between, within = folders["iteration-000001"], folders["iteration-000000-before-update-1"]

    def resumed(folder: str, algorithm: Algorithm, **sampling: Any) -> RFTTrainer:
        usual = [tiny_run.sampler(**sampling), WeightSync()]
        model = tiny_run.module(inputs, algorithm)
        return tiny_run.fit(inputs, tmp_path / "again", (), usual, model, folder, max_iterations=2)

    same, other = Algorithm(kl_coefficient=0.05), Algorithm("rloo")
    with pytest.raises(
        ValueError, match=r"written with algorithm=advantage='group_norm'.*this run has advantage='rloo'"
    ):
        resumed(within, other)
    with pytest.raises(ValueError, match=r"written with sampling=Sampling\(.*temperature=0\.7.*inside an iteration"):
        resumed(within, same, temperature=0.7)
    assert resumed(within, same).progress.iteration == 2
    assert float(tiny_run.rows(resumed(between, other, temperature=0.7).log_dir)[2]["kl/reference"]) != 0


def test_a_warm_up_that_leaves_the_policy_nothing_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"warmup_iterations=3 leaves the policy none of trainer\.max_iterations=3"):
        tiny_run.fit(inputs, tmp_path, model=ppo(inputs, warmup_iterations=3))
    tiny_run.fit(inputs, tmp_path, model=ppo(inputs, warmup_iterations=3), fast_dev_run=True)


def test_a_prompt_must_fit_into_the_critics_context_too(inputs: Path, tmp_path: Path) -> None:
    short = CriticModule(config=tiny_run.QWEN2 | {"max_position_embeddings": 8})
    module = RFTModule(tiny_run.actor(inputs), "ppo", tiny_run.scoring(tiny_run.shortness), short)
    with pytest.raises(ValueError, match=r"train/0.* 4 tokens"):
        tiny_run.fit(inputs, tmp_path, model=module)


def test_the_row_is_the_mean_of_the_updates_that_measured(inputs: Path, tmp_path: Path) -> None:
    class Watch(RFTCallback):
        def on_update_start(self, trainer: RFTTrainer, pl_module: Any, batch: Batch) -> None:
            if trainer.progress.update == 0:
                batch.response_mask = torch.zeros_like(batch.response_mask)

        def on_update_end(self, trainer: Any, pl_module: Any, outputs: dict[str, float]) -> None:
            losses.append(outputs.get("loss"))

    losses: list[float | None] = []
    trainer = tiny_run.fit(inputs, tmp_path, [Watch()], max_iterations=1)
    assert losses[0] is None
    row = tiny_run.rows(trainer.log_dir)[1]
    assert float(row["loss"]) == losses[1] and float(row["skipped_updates"]) == 1 and float(row["responses"]) == 8


def test_throughput_counts_what_a_refill_samples_and_greedy_responses(inputs: Path, tmp_path: Path) -> None:
    class Watch(RFTCallback):
        def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
            drawn.extend([*rollout.greedy, *(response for _, response in rollout)])

    for algorithm in (Algorithm("dapo"), Algorithm("remax")):
        drawn: list[Any] = []
        model = tiny_run.module(inputs, algorithm, tiny_run.scoring(tiny_run.shortness_of_odd_sums))
        throughput = Throughput()
        usual = [tiny_run.sampler(), WeightSync(), throughput, Watch()]
        tiny_run.fit(inputs, tmp_path / algorithm.preset, usual=usual, model=model, max_iterations=1)
        assert throughput.tokens == sum(len(response.token_ids) for response in drawn)
        assert len(drawn) > 16


def test_evaluation_leaves_the_moments_of_rewards_alone(inputs: Path, tmp_path: Path) -> None:
    class Watch(RFTCallback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            states.append(pl_module.algorithm.state_dict())

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            assert pl_module.algorithm.state_dict() == states[-1]

    states: list[dict[str, Any]] = []
    model = ppo(inputs, normalize_rewards=True)
    tiny_run.fit(inputs, tmp_path, [Watch()], model=model)
    counts = [state["rewards_so_far"]["count"] for state in states]
    assert counts == [0, 32, 48]  # 16 responses an iteration; validated at the start, after 2, after 3


def test_every_metric_that_is_promised_is_in_the_row(inputs: Path, tmp_path: Path) -> None:
    promised = {
        "reward/mean", "reward/std", "reward/shortness/mean", "reward/shortness/std", "advantage/mean", "advantage/std",
        "ratio_mean", "ratio_max", "clip_fraction_low", "clip_fraction_high", "kl/reference", "kl/rollout", "entropy",
        "gradient_norm", "correction/weight_mean", "correction/bounded_fraction", "correction/effective_sample_size",
        "groups_without_spread", "response_tokens/mean", "response_tokens/max", "truncated_fraction", "value/loss",
        "value/explained_variance", "value/gradient_norm",
    }  # fmt: skip
    trainer = tiny_run.fit(inputs, tmp_path, model=ppo(inputs, correction="token_tis"), max_iterations=1)
    assert promised <= tiny_run.rows(trainer.log_dir)[1].keys()
    model = tiny_run.module(inputs, Algorithm("dapo", kl="loss_k3"))
    trainer = tiny_run.fit(inputs, tmp_path, model=model, max_iterations=1)
    promised = {"refill/rounds", "refill/prompts", "refill/missing_groups", "kl_coefficient", "kl_loss"}
    assert promised <= tiny_run.rows(trainer.log_dir)[1].keys()


def test_a_ratio_that_is_the_largest_of_an_update_is_the_largest_of_the_row(inputs: Path, tmp_path: Path) -> None:
    class Watch(RFTCallback):
        def on_update_end(self, trainer: Any, pl_module: Any, outputs: dict[str, float]) -> None:
            largest.append(outputs["ratio_max"])

    largest: list[float] = []
    trainer = tiny_run.fit(inputs, tmp_path, [Watch()], max_iterations=1)
    assert len(largest) == 2 and largest[0] < largest[1]
    assert float(tiny_run.rows(trainer.log_dir)[1]["ratio_max"]) == pytest.approx(max(largest))
