from __future__ import annotations

import pytest

from lightrft.rewards import BoxedFormat, ExactMatch, Reward, RewardInput, ThinkFormat


def score(reward: Reward, response: str, **others: str | None) -> float | None:
    return reward.score_all([RewardInput(response, **others)])[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [(" Paris \n", "Paris", 1.0), ("Paris", " Paris", 1.0), ("paris", "Paris", 0.0), ("", "Paris", 0.0), ("", "", 1.0)],
)
def test_exact_match_compares_without_surrounding_whitespace(response: str, reference: str, expected: float) -> None:
    assert score(ExactMatch(), response, reference=reference) == expected


def test_exact_match_may_ignore_case() -> None:
    assert score(ExactMatch(ignore_case=True), "STRASSE", reference="straße") == 1.0
    assert score(ExactMatch(ignore_case=True), "Gasse", reference="straße") == 0.0


def test_exact_match_has_no_score_without_a_reference() -> None:
    assert score(ExactMatch(), "Paris") is None


THINK = "<think>2 + 2</think>"


@pytest.mark.parametrize(
    ("response", "think", "boxed"),
    [
        (THINK + r" It is \boxed{4}.", 1.0, 1.0),
        ("Well.\n" + THINK + r"\boxed{4}", 1.0, 1.0),
        (THINK + r"\boxed{3}" + THINK + r"\boxed{4}", 1.0, 1.0),
        (THINK + " It is 4.", 1.0, 0.0),
        (THINK + r"\boxed{4", 1.0, 0.0),
        (THINK + r"\boxed{ }", 1.0, 0.0),
        (THINK + r"\boxed{4} <think>wait", 0.0, 0.0),
        (r"<think>\boxed{4}</think> Done.", 1.0, 0.0),
        (r"\boxed{4} <think>so</think>", 0.0, 0.0),
        (r"<think>2 + 2 \boxed{4}", 0.0, 0.0),
        (r"2 + 2</think>\boxed{4}", 0.0, 0.0),
        (r"</think>so<think>\boxed{4}", 0.0, 0.0),
        ("<think> \n </think>" + r"\boxed{4}", 0.0, 0.0),
        (r"<think></think>\boxed{4}", 0.0, 0.0),
        (r"<THINK>so</THINK>\boxed{4}", 0.0, 0.0),
        (THINK + "  \n", 0.0, 0.0),
        (r"\boxed{4}", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("<think>" * 200_000 + "</think>" * 200_000 + r"\boxed{4}", 1.0, 1.0),
    ],
)
def test_format_needs_a_closed_thought_before_the_answer(response: str, think: float, boxed: float) -> None:
    assert score(ThinkFormat(), response) == think
    assert score(BoxedFormat(), response) == boxed


@pytest.mark.parametrize("reward", [ThinkFormat(), BoxedFormat(), ExactMatch()])
def test_a_template_in_the_prompt_earns_nothing(reward: Reward) -> None:
    template = THINK + r"\boxed{4}"
    assert score(reward, "I do not know.", prompt=template, reference=template) == 0.0
