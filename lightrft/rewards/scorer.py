"""Scores a rollout: every response by the recipe of its label, and what happens where there is no score."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from lightrft.rewards.base import Reward, RewardInput
from lightrft.rewards.recipes import BUILT_IN, Component, check_recipe
from lightrft.samples import Prompt, Response, Rollout
from lightrft.whereabouts import mark

NoScorePolicy = Literal["raise", "drop_response", "drop_group"]

_Answer = float | Exception | None  # what a reward returned, or raised
_DEFAULT = "default"
_LARGEST = torch.finfo(torch.float32).max  # rewards become float32
# The same on every rank, whatever its prompts: metrics are reduced key by key.
_COUNTERS = ("no_score", "not_finite", "aborted", "dropped_responses", "dropped_groups", "timeouts", "worker_deaths")

logger = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A response could not be scored. The message names the reward, the prompt and what to do."""


class Scorer:
    """Fills a rollout's rewards: the weighted sum of the scores that the recipe of the prompt's label gives.

    A response has no score where a component with a weight gives ``None``, a number that is not finite (in float32),
    or raises; so has one whose sum is not finite. Aborted responses are dropped without being scored.

    Args:
        recipes: components by label, over and above the built-in ``gsm8k_rule``, ``geo3k_rule`` and ``exact_match``;
            a label given here replaces a built-in one. Prompts without a label use the recipe ``default``.
        on_no_score: ``raise``; ``drop_response`` takes the response out of the update; ``drop_group`` takes out all
            responses to its prompt; a number is given to it as its reward.

    Raises:
        ValueError: an empty recipe, two components of one name, or an unknown policy.
    """

    def __init__(
        self,
        recipes: dict[str, list[Component]] | None = None,
        on_no_score: NoScorePolicy | float = "raise",
    ) -> None:
        number = isinstance(on_no_score, (int, float)) and _is_finite(on_no_score)
        if not number and on_no_score not in get_args(NoScorePolicy):
            raise ValueError(
                f"on_no_score is {on_no_score!r}; it must be raise, drop_response, drop_group or a finite number, the "
                "reward where there is no score."
            )
        self.recipes = dict(recipes or {})
        for label, components in self.recipes.items():
            check_recipe(label, components)
        self.on_no_score = on_no_score

    def check_labels(self, labels: Iterable[str | None], complete: bool = False) -> None:
        """Raise ``ValueError`` for a label without a recipe, before anything is trained or generated.

        Built-in recipes among them are built here, so a package they need and lack is named here too
        (``ModuleNotFoundError``).

        Args:
            labels: of the prompts.
            complete: whether they are those of all prompts; a recipe for another label, which nothing would use, is
                then refused too.
        """
        labels = list(dict.fromkeys(labels))
        for label in labels:
            self._recipe(label)
        names = [_DEFAULT if label is None else label for label in labels]
        unused = [name for name in self.recipes if name not in names]
        if complete and unused:
            raise ValueError(
                f"No prompt has the label {unused[0]!r}, so its reward recipe would have no effect (labels are: "
                f"{', '.join(sorted(names))}); correct the label or remove the recipe."
            )

    def score(self, rollout: Rollout) -> dict[str, float]:
        """Fill ``reward``, ``reward_parts`` and ``dropped`` of every response, in place.

        Returns:
            Counts: responses with ``no_score``; component scores ``not_finite``; responses ``aborted``;
            ``dropped_responses`` in all; ``dropped_groups``; and what the rewards counted (``timeouts``, …).

        Raises:
            RewardError: no score under ``on_no_score="raise"``, or a reward that returns the wrong number of scores.
                The rollout is then as it was.
            ValueError: a label without a recipe.
        """
        counters = dict.fromkeys(_COUNTERS, 0.0)
        groups = [
            [_Scored(prompt, response) for response in group] for prompt, group in zip(rollout.prompts, rollout.groups)
        ]
        for label, scored in self._by_label(groups).items():
            for component in self._recipe(label):
                self._apply(component, scored, counters)
            for one in scored:
                one.check_sum(counters)
        if self.on_no_score == "raise":
            _raise_first(groups)
        for group in groups:
            self._settle(group, counters)
        self._add_counters(counters)
        return counters

    def close(self) -> None:
        """End processes and connections of every reward."""
        for reward in self._rewards():
            reward.close()

    def _recipe(self, label: str | None) -> list[Component]:
        name = _DEFAULT if label is None else label
        if name not in self.recipes and name in BUILT_IN:
            self.recipes[name] = BUILT_IN[name]()
        if name not in self.recipes:
            known = ", ".join(sorted({*self.recipes, *BUILT_IN}))
            what = "A prompt has no label and there is" if label is None else f"For the label {label!r} there is"
            raise ValueError(
                f"{what} no reward recipe {name!r} (there are: {known}); add it to the scorer's recipes, e.g. "
                f"recipes: {{{name}: [{{reward: {{class_path: lightrft.rewards.ExactMatch}}}}]}}."
            )
        return self.recipes[name]

    def _by_label(self, groups: list[list[_Scored]]) -> dict[str | None, list[_Scored]]:
        by_label: dict[str | None, list[_Scored]] = {}
        for one in (one for group in groups for one in group):
            if one.response.finish_reason != "abort":
                by_label.setdefault(one.prompt.label, []).append(one)
        return by_label

    def _apply(self, component: Component, scored: list[_Scored], counters: dict[str, float]) -> None:
        """Write one component's scores beside its responses."""
        for one, answer in zip(scored, self._ask(component.reward, scored)):
            if isinstance(answer, float) and _is_finite(answer):
                one.parts[component.metric_name] = answer
                one.total += component.weight * answer
                continue
            counters["not_finite"] += isinstance(answer, float)
            broken = isinstance(answer, Exception) and self.on_no_score == "raise"
            if component.weight or broken:
                one.fault = one.fault or _Fault(type(component.reward).__name__, answer)

    def _ask(self, reward: Reward, scored: list[_Scored]) -> list[_Answer]:
        """What the reward answers to each. One call for all; one by one where the reward itself does just that."""
        mark(f"scores of {type(reward).__name__}")
        items = [RewardInput.of(one.prompt, one.response) for one in scored]
        if type(reward).score_all is Reward.score_all:
            answers = [_score_one(reward, item) for item in items]
        else:
            answers = _score_batch(reward, items)
        failed = [(one, answer) for one, answer in zip(scored, answers) if isinstance(answer, Exception)]
        if failed and self.on_no_score != "raise":
            one, error = failed[0]
            logger.warning(
                "%s raised on %d of %d responses, which have no score from it; the first is for prompt %r: %r",
                type(reward).__name__, len(failed), len(items), one.prompt.uid, error,
            )  # fmt: skip
        return answers

    def _settle(self, group: list[_Scored], counters: dict[str, float]) -> None:
        """Carry out the policy on the responses to one prompt."""
        faulty = any(one.fault for one in group)
        drop_group = faulty and self.on_no_score == "drop_group"
        counters["dropped_groups"] += drop_group
        for one in group:
            response, aborted = one.response, one.response.finish_reason == "abort"
            response.reward_parts = one.parts
            response.reward = None if aborted else one.total
            if one.fault:
                response.reward = None if isinstance(self.on_no_score, str) else float(self.on_no_score)
            response.dropped = aborted or drop_group or (one.fault is not None and self.on_no_score == "drop_response")
            counters["no_score"] += one.fault is not None
            counters["aborted"] += aborted
            counters["dropped_responses"] += response.dropped

    def _add_counters(self, counters: dict[str, float]) -> None:
        for reward in self._rewards():
            for name, count in reward.take_counters().items():
                counters[name] = counters.get(name, 0.0) + count

    def _rewards(self) -> list[Reward]:
        rewards = [component.reward for components in self.recipes.values() for component in components]
        return list({id(reward): reward for reward in rewards}.values())


@dataclass
class _Fault:
    """Why a response has no score: who answered what."""

    who: str
    answer: _Answer

    def __str__(self) -> str:
        if isinstance(self.answer, Exception):
            return f"{self.who} raised {type(self.answer).__name__}: {self.answer}"
        return f"{self.who} gave {self.answer}, which is no score"


@dataclass
class _Scored:
    """A response while it is being scored; nothing is written to it before every score is known."""

    prompt: Prompt
    response: Response
    parts: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    fault: _Fault | None = None

    def check_sum(self, counters: dict[str, float]) -> None:
        if self.fault is None and not _is_finite(self.total):
            counters["not_finite"] += 1.0
            self.fault = _Fault("The weighted sum of the recipe", self.total)


def _score_one(reward: Reward, item: RewardInput) -> _Answer:
    try:
        return _as_answer(reward.score(item))
    except Exception as error:
        return error
    finally:
        mark()


def _score_batch(reward: Reward, items: list[RewardInput]) -> list[_Answer]:
    try:
        scores = list(reward.score_all(items))
    except Exception as error:
        return [error] * len(items)
    if len(scores) != len(items):
        raise RewardError(
            f"{type(reward).__name__}.score_all returned {len(scores)} scores for {len(items)} responses; "
            "it must return one for each, None where there is none."
        )
    return [_as_answer(score) for score in scores]


def _as_answer(score: Any) -> _Answer:
    """A plain float of whatever number a reward returns (bool, NumPy, a tensor of one element)."""
    try:
        return None if score is None else float(score)
    except Exception as error:
        return error


def _is_finite(number: float) -> bool:
    return math.isfinite(number) and abs(number) <= _LARGEST


def _raise_first(groups: list[list[_Scored]]) -> None:
    for one in (one for group in groups for one in group):
        if one.fault is not None:
            raise RewardError(
                f"Prompt {one.prompt.uid!r}: {one.fault}; mend the record or the reward, or set on_no_score to "
                "drop_response, drop_group or a number."
            ) from (one.fault.answer if isinstance(one.fault.answer, Exception) else None)
