"""What changes in an algorithm during a run goes into its state and comes back; its text says what it does."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from algorithms.steps import LONGEST, alone, step
from torch import Tensor

from lightrft.algorithms import LIKE, PRESETS, Advantage, Algorithm, Axes
from lightrft.samples import Batch


def rewarded(*rewards: float) -> Batch:
    return step([[True]] * len(rewards), rewards=torch.tensor(rewards, dtype=torch.float64)).batch


def test_a_run_goes_on_from_its_state_bit_by_bit() -> None:
    straight, before = (Algorithm("ppo", normalize_rewards=True) for _ in range(2))
    for algorithm in (straight, before):
        algorithm.shape_rewards(rewarded(1.0, 0.3, -2.0), LONGEST, alone)
        algorithm.kl_coefficient = 0.123
    after = Algorithm("ppo", normalize_rewards=True)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.kl_coefficient == 0.123
    batches = [rewarded(0.7, 5.0) for _ in range(2)]
    for algorithm, batch in zip((straight, after), batches):
        algorithm.shape_rewards(batch, LONGEST, alone)
    assert torch.equal(batches[0].rewards, batches[1].rewards)
    assert straight.state_dict() == after.state_dict()


class Running(Advantage):
    """A baseline that follows the rewards."""

    def __init__(self) -> None:
        self.baseline = 0.0

    def __call__(self, batch: Batch, token_rewards: Tensor) -> Tensor:
        self.baseline += 0.5 * (float(batch.rewards.mean()) - self.baseline)
        return (batch.rewards - self.baseline)[:, None]

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline = state["baseline"]


def test_an_advantage_of_ones_own_keeps_its_state() -> None:
    before, after = (Algorithm(advantage=Running()) for _ in range(2))
    before.prepare(rewarded(1.0, 3.0), alone)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.advantage.baseline == 1.0  # type: ignore[attr-defined]
    after.load_state_dict(Algorithm("rloo").state_dict())  # it is chosen anew: nothing of another one's state
    assert after.advantage.baseline == 1.0  # type: ignore[attr-defined]


def test_a_kl_coefficient_that_is_configured_anew_takes_effect() -> None:
    before = Algorithm(kl_coefficient=0.1)
    before.kl_coefficient = 0.2
    for configured, expected in ((0.1, 0.2), (0.3, 0.3)):
        after = Algorithm(kl_coefficient=configured)
        after.load_state_dict(before.state_dict())
        assert after.kl_coefficient == expected


def test_a_new_run_has_seen_no_reward() -> None:
    state = Algorithm("ppo", normalize_rewards=True).state_dict()
    assert state["kl_coefficient"] == PRESETS["ppo"].kl_coefficient and state["rewards_so_far"]["count"] == 0
    fresh = Algorithm("ppo", normalize_rewards=True)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state


def test_the_moments_of_rewards_move_with_training_alone() -> None:
    algorithm = Algorithm("reinforce", normalize_rewards=True)
    algorithm.shape_rewards(rewarded(1.0, 3.0), LONGEST, alone)
    seen = algorithm.state_dict()
    batch = rewarded(9.0, -9.0)
    algorithm.filter_groups(batch, batch.rewards)
    algorithm.prepare(batch, alone)
    assert algorithm.state_dict() == seen


CHANGES: dict[str, Any] = {
    "advantage": "rloo",
    "whiten": True,
    "ratio": "sequence",
    "objective": "clipped_log_prob",
    "clip_low": 0.11,
    "clip_high": 0.11,
    "dual_clip": 3.0,
    "drift": 0.1,
    "aggregation": "token_mean",
    "kl": "loss_k2",
    "kl_coefficient": 0.5,
    "entropy_bonus": 0.1,
    "correction": "token_tis",
    "top_entropy_fraction": 0.5,
    "group_filter": "drop",
    "mask_truncated": True,
    "overlong_buffer_fraction": 0.3,
    "clip_rewards": 3.0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_text_of_an_algorithm_changes_with_every_axis(name: str) -> None:
    plain, changed = Algorithm(), Algorithm(**{name: CHANGES[name]})
    assert repr(plain) != repr(changed) and str(plain) != str(changed)
    assert f"{name}={CHANGES[name]!r}" in repr(changed) and f"{name} {CHANGES[name]}" in str(changed)


def test_the_text_of_an_algorithm_names_every_axis_however_it_was_chosen() -> None:
    text = repr(Algorithm("dr_grpo"))
    assert all(f"{f.name}=" in text for f in fields(Axes))
    assert text == repr(Algorithm("grpo", advantage="group_mean", aggregation="token_sum_norm", kl="none"))
    texts = {repr(Algorithm(name)) for name in PRESETS}  # type: ignore[arg-type]
    assert len(texts) == len(set(PRESETS.values())) == len(PRESETS)


def test_what_is_off_or_without_effect_is_not_shown() -> None:
    assert str(Algorithm()) == (
        "grpo: advantage group_norm, std_epsilon 1e-06, ratio token, objective clipped_ratio, clip_low 0.2, "
        "clip_high 0.2, aggregation seq_mean_token_mean, kl loss_k3, kl_coefficient 0.001"
    )
    assert "gamma 1.0, gae_lambda 0.95, whiten True" in str(Algorithm("ppo"))
    assert "refill_rounds 10" in str(Algorithm("dapo"))
    assert "correction token_mask, correction_low 0.5, correction_high 5.0" in str(Algorithm(correction="token_mask"))
    assert "gae_lambda" in str(Algorithm("ppo", gae_lambda=0.9)) and "gae_lambda" not in str(Algorithm("grpo", "verl"))
    assert str(Algorithm("grpo", "verl")).startswith("grpo like verl: ")


def test_rows_of_the_tables_are_whole_and_frozen() -> None:
    for axes in [*PRESETS.values(), *(axes for table in LIKE.values() for axes in table.values())]:
        assert replace(axes) == axes
        with pytest.raises(AttributeError):
            axes.clip_low = 0.3  # type: ignore[misc]
