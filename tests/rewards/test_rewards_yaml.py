from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import lightrft.rewards
from lightrft.rewards import ExactMatch, FunctionReward, MathAccuracy, Reward, Scorer
from lightrft.samples import Rollout

MakeRollout = Callable[..., Rollout]


SETTINGS = """
rewards:
  on_no_score: -1.0
  recipes:
    default:
      - reward: {class_path: lightrft.rewards.ExactMatch, init_args: {ignore_case: true}}
        weight: 0.5
    words:
      - reward: {class_path: lightrft.rewards.FunctionReward, init_args: {function: words_of_this_test.count_words}}
        name: words
      - reward:
          class_path: lightrft.rewards.MathAccuracy
          init_args: {answer: last_expression, seconds_per_answer: 3, workers: 2}
        weight: 0
"""


def parse(settings: str, nested: bool) -> Scorer:
    parser = ArgumentParser(exit_on_error=False)
    if nested:
        parser.add_class_arguments(Scorer, "rewards")
    else:
        parser.add_argument("--rewards", type=Scorer)
        document = yaml.safe_load(settings)
        settings = yaml.safe_dump(
            {"rewards": {"class_path": "lightrft.rewards.Scorer", "init_args": document["rewards"]}}
        )
    config = parser.parse_string(settings)
    assert parser.parse_string(parser.dump(config)) == config
    return parser.instantiate(config).rewards


@pytest.fixture(autouse=True)
def words_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words_of_this_test.py").write_text("def count_words(item):\n    return len(item.response.split())\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("nested", [True, False], ids=["class arguments", "class_path"])
def test_yaml_builds_the_scorer(make_rollout: MakeRollout, nested: bool) -> None:
    scorer = parse(SETTINGS, nested)
    exact, words, accuracy = (component.reward for recipe in scorer.recipes.values() for component in recipe)
    assert isinstance(exact, ExactMatch)
    assert isinstance(words, FunctionReward)
    assert isinstance(accuracy, MathAccuracy)
    assert (accuracy.answer, accuracy.seconds_per_answer, accuracy.workers) == ("last_expression", 3.0, 2)
    rollout = make_rollout((None, "Yes", ["yes"]), (None, None, ["yes"]), ("words", None, ["one two"]))
    scorer.score(rollout)
    assert [[response.reward for response in group] for group in rollout.groups] == [[0.5], [-1.0], [2.0]]


@pytest.mark.parametrize(
    "settings",
    [
        "rewards: {on_no_score: ignore}",
        "rewards: {policy: raise}",
        "rewards: {recipes: {a: [{reward: {class_path: lightrft.rewards.ExactMatch, init_args: {case: 1}}}]}}",
        "rewards: {recipes: {a: [{reward: {class_path: lightrft.rewards.Scorer}}]}}",
        "rewards: {recipes: {a: [{weight: 1.0}]}}",
    ],
)
def test_what_the_scorer_does_not_know_is_refused(settings: str) -> None:
    with pytest.raises(Exception, match=r"rewards"):
        parse(settings, nested=True)


def test_the_settings_may_be_left_out() -> None:
    assert parse("rewards: {}", nested=True).recipes == {}


def test_every_reward_is_exported() -> None:
    exported = {getattr(lightrft.rewards, name) for name in lightrft.rewards.__all__}
    ours = {kind for kind in Reward.__subclasses__() if kind.__module__.startswith("lightrft.rewards")}
    assert ours
    assert ours <= exported
