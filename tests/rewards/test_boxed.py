from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.rewards.boxed import LONGEST_ANSWER, last_boxed

plain = st.text(st.characters(exclude_characters="{}\\"), max_size=8)
balanced = st.recursive(
    plain | st.sampled_from([r"\{", r"\}", r"\\", r"\frac"]),
    lambda inner: st.tuples(inner, inner, inner).map(lambda parts: f"{parts[0]}{{{parts[1]}}}{parts[2]}"),
    max_leaves=12,
)


@given(plain, balanced, plain)
def test_whatever_is_balanced_is_read_back_from_the_last_box(before: str, content: str, after: str) -> None:
    text = rf"{before} \boxed{{wrong}} \boxed{{{content}}} {after}"
    boxed = last_boxed(text)
    assert boxed is not None
    assert boxed.content == content
    assert text[boxed.start :].startswith(r"\boxed{" + content)


@given(st.text("\\boxed{} \n5", max_size=60))
def test_any_text_is_read_without_an_error(text: str) -> None:
    boxed = last_boxed(text)
    assert boxed is None or r"\boxed" in text[boxed.start :]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        ("\\boxed {4}", "4"),
        ("\\boxed{\n5\n}", "\n5\n"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{6}; I put it in \boxed.", "6"),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_box_is_found(text: str, content: str) -> None:
    boxed = last_boxed(text)
    assert boxed is not None
    assert boxed.content == content


@pytest.mark.parametrize(
    "text", ["", "5", r"\boxed", r"\boxed 5", r"\boxed{5", r"\boxed{5} or \boxed{6", r"\boxed{5\}"]
)
def test_without_a_closed_last_box_there_is_none(text: str) -> None:
    assert last_boxed(text) is None


@pytest.mark.parametrize("bomb", [r"\boxed{", r"\boxed", "{", "\\", r"\boxed{" + "9" * 50])
def test_megabytes_of_crafted_text_are_read_in_linear_time(bomb: str) -> None:
    assert last_boxed(bomb * (4_000_000 // len(bomb))) is None  # quadratic scanning would not end


def test_an_answer_longer_than_any_honest_one_is_none() -> None:
    assert last_boxed(rf"\boxed{{{'9' * LONGEST_ANSWER}}}") is not None
    assert last_boxed(rf"\boxed{{{'9' * (LONGEST_ANSWER + 1)}}}") is None
