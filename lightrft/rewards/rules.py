"""Rewards that read the response's text and nothing else."""

from __future__ import annotations

from lightrft.rewards.base import Reward, RewardInput
from lightrft.rewards.boxed import last_boxed

_OPEN, _CLOSE = "<think>", "</think>"


class ExactMatch(Reward):
    """1 where the response is the reference, whitespace around both apart; no score without a reference.

    Args:
        ignore_case: compare case-folded text.
    """

    def __init__(self, ignore_case: bool = False) -> None:
        self.ignore_case = ignore_case

    def score(self, item: RewardInput) -> float | None:
        if item.reference is None:
            return None
        response, reference = item.response.strip(), item.reference.strip()
        if self.ignore_case:
            response, reference = response.casefold(), reference.casefold()
        return float(response == reference)


class ThinkFormat(Reward):
    """1 where the response holds a closed ``<think>...</think>`` block with a thought in it, and an answer after it.

    A block that is opened again after the last closing tag counts as not closed.
    """

    def score(self, item: RewardInput) -> float:
        answer = _answer_start(item.response)
        return float(answer is not None and bool(item.response[answer:].strip()))


class BoxedFormat(Reward):
    r"""1 where the last ``\boxed{...}`` is closed, holds something, and stands after a closed block of thought.

    The block is judged as by :class:`ThinkFormat`.
    """

    def score(self, item: RewardInput) -> float:
        answer, boxed = _answer_start(item.response), last_boxed(item.response)
        if answer is None or boxed is None:
            return 0.0
        return float(boxed.start >= answer and bool(boxed.content.strip()))


def _answer_start(response: str) -> int | None:
    """Where the answer begins: behind the last closing tag; ``None`` without a closed block that holds a thought."""
    opened, closed = response.find(_OPEN), response.rfind(_CLOSE)
    if opened < 0 or closed < opened or response.rfind(_OPEN) > closed:
        return None
    if not response[opened + len(_OPEN) : closed].strip():
        return None
    return closed + len(_CLOSE)
