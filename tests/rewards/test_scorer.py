from __future__ import annotations

import copy
import logging
import math
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.rewards import (
    BoxedFormat,
    Component,
    ExactMatch,
    FunctionReward,
    MathAccuracy,
    Reward,
    RewardError,
    RewardInput,
    Scorer,
    ThinkFormat,
)
from lightrft.samples import Prompt, Response, Rollout, Sampling

MakeRollout = Callable[..., Rollout]
THINK = "<think>2 + 2</think>"


def number(item: RewardInput) -> float | None:
    """The response's text is its score; ``-`` is none."""
    return None if item.response == "-" else float(item.response)


class Batched(Reward):
    """Scores a batch at once and remembers the sizes of the batches."""

    def __init__(self, extra: int = 0) -> None:
        self.sizes: list[int] = []
        self.extra = extra

    def score_all(self, items: Sequence[RewardInput]) -> list[float | None]:
        self.sizes.append(len(items))
        return [number(item) for item in items] + [0.0] * self.extra


class Constant(Reward):
    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, item: RewardInput) -> float:
        return self.value


class Counting(Batched):
    def take_counters(self) -> dict[str, float]:
        taken = {"calls": float(len(self.sizes)), "timeouts": 1.0}
        self.sizes = []
        return taken


def scorer_of(*components: Component, **options: Any) -> Scorer:
    return Scorer({"default": list(components)}, **options)


def number_scorer(**options: Any) -> Scorer:
    return scorer_of(Component(FunctionReward(number)), **options)


def rewards_of(rollout: Rollout) -> list[list[float | None]]:
    return [[response.reward for response in group] for group in rollout.groups]


def dropped_of(rollout: Rollout) -> list[list[bool]]:
    return [[response.dropped for response in group] for group in rollout.groups]


@pytest.mark.parametrize("label", ["gsm8k_rule", "geo3k_rule"])
def test_built_in_math_recipes_weigh_accuracy_and_format(make_rollout: MakeRollout, label: str) -> None:
    texts = [THINK + r"\boxed{4}", r"\boxed{4}", THINK + r"\boxed{5}", "4"]
    rollout = make_rollout((label, "4", texts))
    scorer = Scorer()
    scorer.score(rollout)
    scorer.close()
    assert rewards_of(rollout) == [pytest.approx([1.0, 0.9, 0.1, 0.0])]
    assert rollout.groups[0][1].reward_parts == {"math_accuracy": 1.0, "boxed_format": 0.0}


def test_a_template_in_the_prompt_earns_nothing(make_rollout: MakeRollout) -> None:
    rollout = make_rollout(("geo3k_rule", "4", ["I do not know."]))
    rollout.prompts[0].text = THINK + r"\boxed{4}"
    scorer = Scorer()
    scorer.score(rollout)
    scorer.close()
    assert rewards_of(rollout) == [[0.0]]


def test_each_label_has_its_recipe_and_none_is_default(make_rollout: MakeRollout) -> None:
    rollout = make_rollout((None, None, ["2"]), ("exact_match", "2", ["2", "3"]), ("exact_match", "9", ["9"]))
    number_scorer().score(rollout)
    assert rewards_of(rollout) == [[2.0], [1.0, 0.0], [1.0]]
    assert rollout.groups[1][0].reward_parts == {"exact_match": 1.0}


def test_a_users_recipe_replaces_a_built_in_one(make_rollout: MakeRollout) -> None:
    rollout = make_rollout(("exact_match", "A", ["a"]))
    Scorer({"exact_match": [Component(ExactMatch(ignore_case=True), 2.0)]}).score(rollout)
    assert rewards_of(rollout) == [[2.0]]


def test_a_reward_is_called_once_with_all_responses_of_its_label(make_rollout: MakeRollout) -> None:
    reward = Batched()
    rollout = make_rollout((None, None, ["1", "2"]), ("exact_match", "0", ["0"]), (None, None, ["3", None]))
    scorer_of(Component(reward)).score(rollout)
    assert reward.sizes == [3]  # the aborted response is not scored
    assert rewards_of(rollout) == [[1.0, 2.0], [1.0], [3.0, None]]


finite = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=5))
def test_the_reward_is_the_weighted_sum_and_the_parts_are_unweighted(pairs: list[tuple[float, float]]) -> None:
    components = [Component(Constant(score), weight, f"part_{k}") for k, (weight, score) in enumerate(pairs)]
    rollout = one_response()
    counters = scorer_of(*components).score(rollout)
    response = rollout.groups[0][0]
    assert response.reward == pytest.approx(sum(weight * score for weight, score in pairs), rel=1e-12, abs=1e-3)
    assert response.reward_parts == {f"part_{k}": score for k, (_, score) in enumerate(pairs)}
    assert not response.dropped
    assert set(counters.values()) == {0.0}


@given(st.lists(st.lists(st.sampled_from(["1", "-", "nan", "abort"]), max_size=4), max_size=4))
def test_policies_drop_what_they_say_and_count_it(texts: list[list[str]]) -> None:
    faulty = [[text in ("-", "nan") for text in group] for group in texts]
    aborted = [[text == "abort" for text in group] for group in texts]
    for policy in ("drop_response", "drop_group", 0.0):
        rollout = rollout_of(texts)
        counters = number_scorer(on_no_score=policy).score(rollout)
        expected = {
            "drop_response": [[f or a for f, a in zip(*rows)] for rows in zip(faulty, aborted)],
            "drop_group": [[any(fs) or a for a in row] for fs, row in zip(faulty, aborted)],
            0.0: aborted,
        }[policy]
        assert dropped_of(rollout) == expected
        assert counters["no_score"] == sum(map(sum, faulty))
        assert counters["not_finite"] == sum(text == "nan" for group in texts for text in group)
        assert counters["aborted"] == sum(map(sum, aborted))
        assert counters["dropped_responses"] == sum(map(sum, expected))
        assert counters["dropped_groups"] == (sum(map(any, faulty)) if policy == "drop_group" else 0)
        values = {"1": 1.0, "abort": None}
        missing = 0.0 if policy == 0.0 else None
        assert rewards_of(rollout) == [[values.get(text, missing) for text in group] for group in texts]


def one_response(text: str = "1") -> Rollout:
    return rollout_of([[text]])


def rollout_of(texts: list[list[str]]) -> Rollout:
    prompts = [Prompt(f"data/{row}@0", torch.ones(1, dtype=torch.int64), "Q") for row in range(len(texts))]
    groups = [
        [
            Response(torch.zeros(0, dtype=torch.int64), torch.zeros(0), text, "abort" if text == "abort" else "stop")
            for text in group
        ]
        for group in texts
    ]
    return Rollout(prompts, groups, Sampling())


def test_no_score_raises_by_default_and_leaves_the_rollout_as_it_was() -> None:
    rollout = rollout_of([["1"], ["-"]])
    with pytest.raises(RewardError, match=r"'data/1@0'.*FunctionReward gave None.*on_no_score"):
        number_scorer().score(rollout)
    assert rewards_of(rollout) == [[None], [None]]


def test_no_score_earns_the_given_value() -> None:
    rollout = rollout_of([["1", "-"]])
    counters = number_scorer(on_no_score=-0.5).score(rollout)
    assert rewards_of(rollout) == [[1.0, -0.5]]
    assert counters["no_score"] == 1.0
    assert rollout.groups[0][1].reward_parts == {}


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e39", "-1e39"])
def test_a_score_that_is_not_finite_in_float32_is_no_score(text: str) -> None:
    with pytest.raises(RewardError, match="no score"):
        number_scorer().score(one_response(text))
    assert number_scorer(on_no_score="drop_response").score(one_response(text))["not_finite"] == 1.0


def test_a_sum_that_is_not_finite_is_no_score() -> None:
    scorer = scorer_of(Component(FunctionReward(number), 1e38), on_no_score="drop_response")
    rollout = one_response("1e38")
    counters = scorer.score(rollout)
    assert dropped_of(rollout) == [[True]]
    assert counters["not_finite"] == counters["no_score"] == 1.0


def test_a_part_without_weight_is_logged_and_never_drops() -> None:
    rollout = rollout_of([["1", "-", "nan"]])
    components = [Component(FunctionReward(number), 0.0, "logged"), Component(FunctionReward(lambda item: True))]
    counters = scorer_of(*components).score(rollout)
    assert rewards_of(rollout) == [[1.0, 1.0, 1.0]]
    assert [response.reward_parts.get("logged") for response in rollout.groups[0]] == [1.0, None, None]
    assert counters["no_score"] == 0.0


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("reward", [FunctionReward(number), Batched()])
def test_a_reward_that_raises_is_named_with_its_prompt(reward: Reward, weight: float) -> None:
    with pytest.raises(RewardError, match=rf"data/0@0.*{type(reward).__name__} raised ValueError") as caught:
        scorer_of(Component(reward, weight)).score(rollout_of([["oops"], ["1"]]))
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_reward_that_raises_on_one_response_has_no_score_for_that_one(caplog: pytest.LogCaptureFixture) -> None:
    rollout = rollout_of([["1", "oops"], ["oops", "2"]])
    with caplog.at_level(logging.WARNING):
        counters = number_scorer(on_no_score="drop_response").score(rollout)
    assert rewards_of(rollout) == [[1.0, None], [None, 2.0]]
    assert counters["no_score"] == 2.0
    assert "FunctionReward raised on 2 of 4" in caplog.text
    assert "data/0@0" in caplog.text


def test_a_batch_that_raises_has_no_score_for_any_and_is_not_tried_again() -> None:
    reward = Batched()
    rollout = rollout_of([["1", "oops"]])
    assert scorer_of(Component(reward), on_no_score="drop_response").score(rollout)["no_score"] == 2.0
    assert reward.sizes == [2]


@pytest.mark.parametrize("extra", [1, -1])
@pytest.mark.parametrize("policy", ["raise", "drop_response", 1.0])
def test_a_wrong_number_of_scores_is_refused_under_every_policy(extra: int, policy: str) -> None:
    reward = Batched(extra) if extra > 0 else Shortened()
    with pytest.raises(RewardError, match=r"returned \d scores for 2 responses"):
        scorer_of(Component(reward), on_no_score=policy).score(rollout_of([["1", "2"]]))


class Shortened(Batched):
    def score_all(self, items: Sequence[RewardInput]) -> list[float | None]:
        return super().score_all(items)[:-1]


@pytest.mark.parametrize("score", [True, 1, np.float32(1), torch.tensor(1.0), torch.ones(1, 1, dtype=torch.bfloat16)])
def test_any_kind_of_number_becomes_a_plain_float(score: Any) -> None:
    rollout = one_response()
    scorer_of(Component(FunctionReward(lambda item: score))).score(rollout)
    assert type(rollout.groups[0][0].reward) is float
    assert type(rollout.groups[0][0].reward_parts["function_reward"]) is float
    assert rewards_of(rollout) == [[1.0]]


@pytest.mark.parametrize("score", ["good", [1.0, 2.0], torch.ones(2), 10**400])
def test_what_is_no_number_is_an_error(score: Any) -> None:
    with pytest.raises(RewardError, match="FunctionReward raised"):
        scorer_of(Component(FunctionReward(lambda item: score))).score(one_response())


def test_scoring_again_overwrites() -> None:
    rollout = rollout_of([["-", "1"]])
    number_scorer(on_no_score="drop_group").score(rollout)
    rollout.groups[0][0].text = "3"
    number_scorer().score(rollout)
    assert rewards_of(rollout) == [[3.0, 1.0]]
    assert dropped_of(rollout) == [[False, False]]


def test_counters_have_the_same_keys_whatever_was_scored() -> None:
    reward = Counting()
    recipes = {"default": [Component(reward)], "again": [Component(reward, 0.5)], "unused": [Component(ExactMatch())]}
    scorer = Scorer(recipes)
    empty = scorer.score(rollout_of([]))
    full = scorer.score(one_response())
    assert set(empty) == set(full) == set(number_scorer().score(rollout_of([]))) | {"calls"}
    assert (empty["calls"], full["calls"], full["timeouts"]) == (0.0, 1.0, 1.0)


def test_timeouts_of_math_accuracy_reach_the_counters(make_rollout: MakeRollout) -> None:
    reward = MathAccuracy(seconds_per_answer=2.0, workers=1)
    rollout = make_rollout((None, "5", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2+3}"]))
    scorer = scorer_of(Component(reward))
    counters = scorer.score(rollout)
    scorer.close()
    assert rewards_of(rollout) == [[0.0, 1.0]]
    assert counters["timeouts"] == 1.0
    assert counters["no_score"] == 0.0


@pytest.mark.parametrize(
    ("label", "sentence"),
    [("mystery", r"'mystery'.*exact_match, geo3k_rule, gsm8k_rule, mine.*recipes:"), (None, "no label.*'default'")],
)
def test_a_label_without_a_recipe_is_refused_before_training(label: str | None, sentence: str) -> None:
    scorer = Scorer({"mine": [Component(ExactMatch())]})
    scorer.check_labels(iter(["mine", "gsm8k_rule", "mine"]))
    with pytest.raises(ValueError, match=sentence):
        scorer.check_labels(["mine", label])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipes": {"empty": []}}, "'empty' is empty"),
        ({"recipes": {"twice": [Component(ExactMatch()), Component(ExactMatch(True))]}}, "two components.*exact_match"),
        ({"recipes": {"same": [Component(ExactMatch(), name="a"), Component(BoxedFormat(), name="a")]}}, "called 'a'"),
        ({"on_no_score": math.nan}, "finite"),
        ({"on_no_score": "value"}, "finite number"),
        ({"on_no_score": "ignore"}, "drop_response"),
    ],
)
def test_contradictory_settings_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Scorer(**options)


@pytest.mark.parametrize("arguments", [{"weight": math.nan}, {"weight": math.inf}, {"name": ""}, {"name": " "}])
def test_a_component_without_a_usable_weight_or_name_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"weight|name"):
        Component(ExactMatch(), **arguments)


def test_only_the_recipes_that_use_math_verify_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    Scorer().check_labels(["exact_match"])
    with pytest.raises(ModuleNotFoundError, match="pip install math-verify"):
        Scorer().check_labels(["gsm8k_rule"])


def test_two_of_a_kind_are_told_apart_by_name() -> None:
    components = [Component(FunctionReward(number), 1.0, "a"), Component(FunctionReward(number), -1.0, "b")]
    rollout = one_response("3")
    scorer_of(*components).score(rollout)
    assert rollout.groups[0][0].reward_parts == {"a": 3.0, "b": 3.0}
    assert rewards_of(rollout) == [[0.0]]


def test_names_in_the_metrics_are_snake_case() -> None:
    names = [Component(reward).metric_name for reward in (MathAccuracy(), ThinkFormat(), FunctionReward(number))]
    assert names == ["math_accuracy", "think_format", "function_reward"]


def test_a_scorer_survives_pickling_and_copying(make_rollout: MakeRollout) -> None:
    scorer = Scorer({"default": [Component(MathAccuracy())]}, on_no_score=2.0)
    for copied in (pickle.loads(pickle.dumps(scorer)), copy.deepcopy(scorer)):
        rollout = make_rollout((None, "5", [r"\boxed{5}"]), (None, None, ["5"]))
        copied.score(rollout)
        assert rewards_of(rollout) == [[1.0], [2.0]]
