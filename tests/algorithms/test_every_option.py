"""Every option of an algorithm does what its formula says, by a number worked out by hand; none is left out here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
from algorithms.steps import alone, literal, loss_of

from lightrft.algorithms import LIKE, Algorithm

CASES: dict[str, Callable[[], None]] = {}
LN = math.log
TWO, ONE = [[True], [True]], [[True]]


def option(case: Callable[[], None]) -> Callable[[], None]:
    """The case of the option that it is named after."""
    CASES[case.__name__] = case
    return case


def one_token(d: float, a: float, *arguments: Any, **options: Any) -> float:
    """Loss of a step of one token whose log-ratio is ``d`` and advantage ``a``."""
    return loss_of(Algorithm(*arguments, **options), literal(ONE, advantages=[[a]]), d)


def advantages(mask: list[list[bool]], rows: dict[str, Any], *arguments: Any, **options: Any) -> list[list[float]]:
    batch = literal(mask, **rows)
    Algorithm(*arguments, **options).prepare(batch, alone)
    return batch.advantages.tolist()


def weights(x: list[float], **options: Any) -> list[float]:
    """Of one response whose engine was ``x`` nats away."""
    batch = literal([[True] * len(x)], log_probs_rollout=[[-one for one in x]])
    Algorithm(**options).prepare(batch, alone)
    return batch.policy_weights[0].tolist()


def shaped(rewards: list[float], length: int = 1, longest: int = 10, **options: Any) -> list[float]:
    batch = literal([[True] * length] * len(rewards), rewards=rewards)
    Algorithm("reinforce", **options).shape_rewards(batch, longest, alone)
    return batch.rewards.tolist()


def near(*values: float) -> Any:
    return pytest.approx(list(values), rel=1e-6, abs=1e-9)


@option
def preset() -> None:
    # The mean of the others: 0; 0.5; 0.5.
    rows = {"rewards": [1.0, 0.0, 0.0]}
    found = advantages([[True]] * 3, rows, preset="rloo", kl="none")
    assert [a for (a,) in found] == near(1.0, -0.5, -0.5)


@option
def like() -> None:
    # verl bounds the loss of a bad token at 3 times its advantage; TRL adds 1e-4 to the std, OpenRLHF 1e-9.
    assert one_token(LN(5), -1.0, "ppo") == pytest.approx(5.0)
    assert one_token(LN(5), -1.0, "ppo", like="verl") == pytest.approx(3.0)
    for project, epsilon in (("trl", 1e-4), ("openrlhf", 1e-9), (None, 1e-6)):
        found = advantages(TWO, {"rewards": [1e-3, 0.0]}, "grpo", like=project)
        assert found[0] == near(0.5e-3 / (1e-3 * math.sqrt(0.5) + epsilon))


@option
def advantage() -> None:
    assert advantages(TWO, {"rewards": [3.0, 0.0]}, advantage="group_mean") == [near(1.5), near(-1.5)]


@option
def gamma() -> None:
    found = advantages([[True] * 3], {"rewards": [1.0]}, "reinforce", gamma=0.5)
    assert found == [near(0.25, 0.5, 1.0)]


@option
def gae_lambda() -> None:
    # Errors: 0.25 - 0.5 = -0.25, 1 - 0.25 = 0.75; A_1 = -0.25 + 0.5 * 0.75.
    rows = {"rewards": [1.0], "values_old": [[0.5, 0.25]]}
    assert advantages([[True] * 2], rows, "ppo", kl="none", whiten=False, gae_lambda=0.5) == [near(0.125, 0.75)]


@option
def whiten() -> None:
    # Mean 0.5, variance 0.5.
    scale = 0.5 / math.sqrt(0.5 + 1e-8)
    assert advantages(TWO, {"rewards": [1.0, 0.0]}, "reinforce", whiten=True) == [near(scale), near(-scale)]
    off = advantages(TWO, {"rewards": [1.0, 0.0]}, "reinforce_plus_plus", kl="none", whiten=False)
    assert off == [near(1.0), near(0.0)]


@option
def ratio() -> None:
    batch = literal([[True, True]], advantages=[[1.0, 1.0]])
    # The geometric mean of 4 and 1 is 2; the mean of 4 and 1 is 2.5; GMPO clips ln 4 at ln 2.
    for level, expected in (("token", 2.5), ("sequence", 2.0), ("sequence_token", 2.0)):
        got = loss_of(Algorithm("dapo", ratio=level, clip_high=9.0), batch, [[LN(4), 0.0]])  # type: ignore[arg-type]
        assert got == pytest.approx(-expected)
    got = loss_of(Algorithm("dapo", ratio="geometric", clip_high=LN(2)), batch, [[LN(4), 0.0]])
    assert got == pytest.approx(-math.sqrt(2))


@option
def objective() -> None:
    for name, expected in (
        ("clipped_ratio", 1.1 * 1.5),
        ("clipped_log_prob", LN(1.1) * 1.5),
        ("clipped_weight", 1.1 * 1.5 * LN(1.1)),  # the old log-prob is 0, so the new one is ln 1.1
    ):
        assert one_token(LN(1.1), 1.5, "dapo", objective=name) == pytest.approx(-expected)


@option
def clip_low() -> None:
    assert one_token(LN(0.4), -1.0, "dapo", clip_low=0.5) == pytest.approx(0.5)
    assert one_token(-1.0, -1.0, "gmpo", clip_low=0.7) == pytest.approx(math.exp(-0.7))


@option
def clip_high() -> None:
    assert one_token(LN(2), 1.0, "dapo", clip_high=0.5) == pytest.approx(-1.5)
    assert one_token(1.0, 1.0, "gmpo", clip_high=0.7) == pytest.approx(-math.exp(0.7))


@option
def dual_clip() -> None:
    assert one_token(LN(5), -1.0, "dapo", dual_clip=2.0) == pytest.approx(2.0)


@option
def drift() -> None:
    assert one_token(LN(2), 0.0, "dapo", drift=0.5) == pytest.approx(0.5 * (2 - 1 - LN(2)))


@option
def aggregation() -> None:
    batch = literal([[True, True], [True, False]], advantages=[[1.0, 2.0], [6.0, 0.0]])
    means = {"token_mean": 9 / 3, "seq_mean_token_mean": (1.5 + 6) / 2}
    sums = {"seq_mean_token_sum": (3 + 6) / 2, "token_sum_norm": 9 / 2 / 10}
    for how, expected in (means | sums).items():
        assert loss_of(Algorithm("dapo", aggregation=how), batch) == pytest.approx(-expected)  # type: ignore[arg-type]


@option
def kl() -> None:
    values = {"loss_k2": 0.5**2 / 2, "loss_k3": math.exp(-0.5) - 0.5, "loss_k3_k2": math.exp(-0.5) - 0.5, "none": 0.0}
    for name, value in values.items():
        batch = literal(ONE, log_probs_reference=[[-0.5]])
        assert loss_of(Algorithm(kl=name), batch) == pytest.approx(0.001 * value)  # type: ignore[arg-type]
    for name, value in {"reward_k1": 0.5, "reward_k2": 0.125, "reward_k3": math.exp(-0.5) - 0.5}.items():
        rows = {"rewards": [1.0], "log_probs_reference": [[-0.5]]}
        assert advantages(ONE, rows, "reinforce", kl=name) == [near(1.0 - 0.001 * value)]


@option
def kl_coefficient() -> None:
    batch = literal(ONE, log_probs_reference=[[-0.5]])
    assert loss_of(Algorithm(kl="loss_k2", kl_coefficient=0.2), batch) == pytest.approx(0.2 * 0.125)
    rows = {"rewards": [1.0], "log_probs_reference": [[-0.5]]}
    assert advantages(ONE, rows, "reinforce", kl="reward_k1", kl_coefficient=0.2) == [near(0.9)]


@option
def entropy_bonus() -> None:
    batch = literal([[True, True]])
    assert loss_of(Algorithm("dapo", entropy_bonus=0.2), batch, entropy=1.5) == pytest.approx(-0.3)


@option
def correction() -> None:
    # Ratios 3 and 1.5; their product 4.5, their geometric mean 2.12.
    x, root = [LN(3), LN(1.5)], math.sqrt(4.5)
    expected = {
        "none": (1.0, 1.0),
        "token_tis": (2.0, 1.5),
        "sequence_tis": (2.0, 2.0),
        "token_mask": (1.0, 1.0),
        "token_mask_ratio": (3.0, 1.5),
        "sequence_mask": (0.0, 0.0),
        "sequence_mask_ratio": (0.0, 0.0),
        "geometric_mask": (0.0, 0.0),
        "geometric_mask_ratio": (0.0, 0.0),
    }
    for name, values in expected.items():
        assert weights(x, correction=name) == near(*values)
    for name, value in (("sequence_mask_ratio", 4.5), ("geometric_mask_ratio", root), ("sequence_mask", 1.0)):
        assert weights(x, correction=name, correction_high=5.0) == near(value, value)


@option
def correction_low() -> None:
    assert weights([LN(0.8), LN(0.95)], correction="token_mask", correction_low=0.9) == near(0.0, 1.0)
    assert weights([LN(0.3), 0.0], correction="sequence_mask_ratio", correction_low=0.2) == near(0.3, 0.3)


@option
def correction_high() -> None:
    assert weights([LN(4), LN(2.5)], correction="token_tis", correction_high=3.0) == near(3.0, 2.5)


@option
def top_entropy_fraction() -> None:
    # The median of 1, 2, 3, 4 is 2.5.
    batch = literal([[True] * 4], entropy_old=[[1.0, 4.0, 2.0, 3.0]])
    Algorithm(top_entropy_fraction=0.5).prepare(batch, alone)
    assert batch.policy_weights.tolist() == [[0.0, 1.0, 0.0, 1.0]]


@option
def group_filter() -> None:
    for choice, kept in (
        ("none", [True] * 4),
        ("drop", [False, False, True, True]),
        ("refill", [False] * 2 + [True] * 2),
    ):
        batch = literal([[True]] * 4, rewards=[1.0, 1.0, 0.0, 1.0], group_ids=[0, 0, 1, 1])
        Algorithm(group_filter=choice).filter_groups(batch, batch.rewards)  # type: ignore[arg-type]
        assert batch.response_mask[:, 0].tolist() == kept


@option
def refill_rounds() -> None:
    # The trainer asks how often it may sample further prompts.
    assert Algorithm("dapo", refill_rounds=3).refill_rounds == 3
    assert Algorithm("dapo").refill_rounds == 10 and Algorithm("dapo", group_filter="drop").refill_rounds == 0


@option
def mask_truncated() -> None:
    batch = literal(TWO, rewards=[1.0, 0.0], truncated=[False, True])
    Algorithm("dr_grpo", mask_truncated=True).prepare(batch, alone)
    assert batch.advantages.tolist() == [[0.5], [0.0]] and batch.response_mask.tolist() == [[True], [False]]


@option
def overlong_buffer_fraction() -> None:
    # The buffer is 5 of 10 tokens: (10 - 5 - 8) / 5.
    assert shaped([1.0], length=8, overlong_buffer_fraction=0.5) == near(1 - 0.6)


@option
def normalize_rewards() -> None:
    # Mean 2, variance 2.
    scaled = 1 / math.sqrt(2 + 1e-8)
    assert shaped([1.0, 3.0], normalize_rewards=True) == near(-scaled, scaled)


@option
def clip_rewards() -> None:
    assert shaped([-7.0, 0.5, 7.0], clip_rewards=2.0) == near(-2.0, 0.5, 2.0)


@pytest.mark.parametrize("name", inspect.signature(Algorithm).parameters)
def test_the_option_does_what_its_formula_says(name: str) -> None:
    CASES[name]()


def test_no_case_is_of_an_option_that_is_gone() -> None:
    assert set(CASES) == set(inspect.signature(Algorithm).parameters)


@pytest.mark.parametrize(("project", "name"), [(project, name) for project in LIKE for name in LIKE[project]])
def test_like_is_what_the_table_says(project: Any, name: Any) -> None:
    algorithm = Algorithm(name, like=project)
    assert algorithm.axes == LIKE[project][name]
    assert str(algorithm).startswith(f"{name} like {project}: ")


def test_an_override_stands_over_a_projects_default() -> None:
    algorithm = Algorithm("grpo", like="verl", dual_clip=0.0, kl_coefficient=0.5)
    assert (algorithm.axes.dual_clip, algorithm.axes.kl_coefficient) == (0.0, 0.5)
    assert algorithm.axes.aggregation == LIKE["verl"]["grpo"].aggregation
