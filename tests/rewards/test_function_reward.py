from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from lightrft.rewards import FunctionReward, RewardInput

ITEM = RewardInput("four", prompt="2 + 2?", record={"bonus": 2.0})


@pytest.fixture
def rewards_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "my_rewards_of_this_test"
    (tmp_path / f"{name}.py").write_text(
        "def length(item):\n    return len(item.response) + item.record['bonus']\n\nnot_a_function = 3\n"
    )
    (tmp_path / "broken_rewards_of_this_test.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_dotted_path_and_a_function_score_alike(rewards_module: str) -> None:
    assert FunctionReward(f"{rewards_module}.length").score_all([ITEM, ITEM]) == [6.0, 6.0]
    assert FunctionReward(lambda item: len(item.response) + item.record["bonus"]).score(ITEM) == 6.0


def test_it_survives_pickling_and_copying(rewards_module: str) -> None:
    reward = FunctionReward(f"{rewards_module}.length")
    assert pickle.loads(pickle.dumps(reward)).score(ITEM) == copy.deepcopy(reward).score(ITEM) == 6.0


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("length", "is not a dotted path"),
        ("no_such_module_anywhere.length", "PYTHONPATH"),
        ("my_rewards_of_this_test.lenght", "nothing called 'lenght'"),
        ("my_rewards_of_this_test.not_a_function", "is a int"),
        ("broken_rewards_of_this_test.length", "ZeroDivisionError"),
        (3, "is a int"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_at_construction(
    rewards_module: str, function: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        FunctionReward(function)
