r"""Accuracy of a mathematical answer, judged by math-verify in guarded processes."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

from lightrft.rewards.base import Reward, RewardInput
from lightrft.rewards.boxed import LONGEST_ANSWER, last_boxed
from lightrft.rewards.verifier import Claim, Verdict, Verifier

_EVENTS = {Verdict.TIMEOUT: "timeouts", Verdict.DEATH: "worker_deaths"}


class MathAccuracy(Reward):
    r"""1 where the response's answer is mathematically the reference, as math-verify sees it; no score without one.

    Text from a model can stall a computer algebra system (``\boxed{9^{9^{9}}}``), fill its memory or crash it, so it
    is parsed in worker processes only, never in ours. An answer that takes too long, or that ends its worker, earns 0
    and is counted (``timeouts``, ``worker_deaths``); the others are scored by a new worker. Workers start with the
    first answer that needs one and end with :meth:`close`, with this object, or with our process, however it ends.

    Args:
        answer: ``boxed``: the last ``\boxed{...}`` of the response. ``last_expression``: what math-verify finds in
            the last 2048 characters: a "final answer is" before a box before the last formula or number.
        seconds_per_answer: wall time one answer may take.
        workers: processes at most, in each rank.

    Raises:
        ValueError: an argument outside its range.
        ModuleNotFoundError: math-verify is not installed.

    Source: https://github.com/huggingface/Math-Verify
    """

    def __init__(
        self,
        answer: Literal["boxed", "last_expression"] = "boxed",
        seconds_per_answer: float = 5.0,
        workers: int = 4,
    ) -> None:
        if answer not in ("boxed", "last_expression"):
            raise ValueError(f"answer is {answer!r}; it must be 'boxed' or 'last_expression'.")
        if not (math.isfinite(seconds_per_answer) and seconds_per_answer > 0):
            raise ValueError(f"seconds_per_answer is {seconds_per_answer!r}; it must be a number above 0.")
        if workers < 1:
            raise ValueError(f"workers is {workers!r}; it must be at least 1.")
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("MathAccuracy needs math-verify; install it with `pip install math-verify`.")
        self.answer = answer
        self.seconds_per_answer = seconds_per_answer
        self.workers = workers
        self._counters = dict.fromkeys(_EVENTS.values(), 0.0)
        self._verifier: Verifier | None = None

    def score(self, item: RewardInput) -> float | None:
        return self.score_all([item])[0]

    def score_all(self, items: Sequence[RewardInput]) -> list[float | None]:
        scores: list[float | None] = [None] * len(items)
        claims: dict[int, Claim] = {}
        for index, item in enumerate(items):
            claim = self._claim(item)
            if isinstance(claim, Claim):
                claims[index] = claim
            else:
                scores[index] = claim
        for index, verdict in zip(claims, self._verify(list(claims.values()))):
            scores[index] = float(verdict is Verdict.RIGHT)
            if verdict in _EVENTS:
                self._counters[_EVENTS[verdict]] += 1.0
        return scores

    def take_counters(self) -> dict[str, float]:
        taken = dict(self._counters)
        self._counters = dict.fromkeys(taken, 0.0)
        return taken

    def close(self) -> None:
        if self._verifier is not None:
            self._verifier.close()
            self._verifier = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_verifier": None}  # a copy, here or in another process, starts its own workers

    def _claim(self, item: RewardInput) -> Claim | float | None:
        """What math-verify must look at, or the score where that is plain without it."""
        reference = _plain(item.reference or "")
        if not reference:
            return None
        if self.answer == "boxed":
            boxed = last_boxed(item.response)
            text = _plain(boxed.content) if boxed else ""
            if text == reference:
                return 1.0
        else:
            text = item.response[-LONGEST_ANSWER:].strip()
        if not text or len(reference) > LONGEST_ANSWER:
            return 0.0
        return Claim(reference, text, boxed=self.answer == "boxed")

    def _verify(self, claims: list[Claim]) -> list[Verdict]:
        if not claims:
            return []
        if self._verifier is None or self._verifier.owner != os.getpid():  # a forked process starts its own workers
            self._verifier = Verifier(self.workers, self.seconds_per_answer)
        return self._verifier.verify(claims)


def _plain(answer: str) -> str:
    """Without a box around it, whitespace, and the full stop of the sentence it ended."""
    boxed = last_boxed(answer)
    return (boxed.content if boxed else answer).strip().removesuffix(".").strip()
