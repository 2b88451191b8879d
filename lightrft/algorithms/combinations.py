"""Which choices on the axes go together: every refusal, with its reason."""

from __future__ import annotations

import math
from typing import Any, get_args, get_type_hints

from lightrft.algorithms.advantages import DISCOUNTED, Advantage
from lightrft.algorithms.policy_loss import Objective
from lightrft.algorithms.presets import Axes


def check_axes(axes: Axes, given: dict[str, Any], advantage: Advantage, objective: Objective) -> None:
    """Refuse what makes no sense.

    Args:
        axes: all choices.
        given: the choices that were made explicitly, over a preset's.
        advantage, objective: what ``axes.advantage`` and ``axes.objective`` stand for.

    Raises:
        ValueError: a number out of range, a combination that makes no sense, or an explicit choice without effect.
    """
    _check_numbers(axes)
    for fault, reason in _senseless(axes, advantage, objective):
        if fault:
            raise ValueError(reason)
    for name, (effective, reason) in effects(axes).items():
        if name in given and not effective:
            raise ValueError(f"{name}={given[name]!r} has no effect: {reason}. Remove it.")


def check_choices(given: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a name that is no choice of its axis; lists the choices."""
    if given.get("kl") == "loss_k1":
        raise ValueError("kl='loss_k1' is refused: the expected gradient of k1 on policy is 0. Use loss_k2 or loss_k3.")
    for name, hint in get_type_hints(Axes).items():
        names = [choice for one in (hint, *get_args(hint)) for choice in get_args(one) if isinstance(choice, str)]
        value = given.get(name)
        if names and (isinstance(value, str) and value not in names):
            raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(dict.fromkeys(names))}.")


def _check_numbers(axes: Axes) -> None:
    log_bounds = axes.ratio == "geometric"
    rules = {
        "clip_low": (0 < axes.clip_low <= (math.inf if log_bounds else 1), "above 0 (a ratio's: at most 1)"),
        "clip_high": (axes.clip_high > 0, "above 0"),
        "dual_clip": (axes.dual_clip == 0 or 1 < axes.dual_clip < math.inf, "0 (off) or above 1"),
        "drift": (0 <= axes.drift < math.inf, "0 (off) or more"),
        "gamma": (0 < axes.gamma <= 1, "in (0, 1]"),
        "gae_lambda": (0 <= axes.gae_lambda <= 1, "in [0, 1]"),
        "kl_coefficient": (0 <= axes.kl_coefficient < math.inf, "0 or more and finite"),
        "entropy_bonus": (0 <= axes.entropy_bonus < math.inf, "0 (off) or more"),
        "correction_low": (axes.correction_low is None or 0 <= axes.correction_low < 1, "in [0, 1), as 1 is right"),
        "correction_high": (axes.correction_high is None or axes.correction_high >= 1, "at least 1, as 1 is right"),
        "top_entropy_fraction": (0 < axes.top_entropy_fraction <= 1, "in (0, 1]; 1 is all"),
        "refill_rounds": (axes.refill_rounds >= 1, "at least 1"),
        "overlong_buffer_fraction": (0 <= axes.overlong_buffer_fraction < 1, "in [0, 1); 0 is off"),
        "clip_rewards": (0 <= axes.clip_rewards < math.inf, "0 (off) or more"),
    }  # fmt: skip
    for name, (holds, want) in rules.items():
        if not holds:
            raise ValueError(f"{name} is {getattr(axes, name)}; it must be {want}.")


def _senseless(axes: Axes, advantage: Advantage, objective: Objective) -> list[tuple[bool, str]]:
    whole, name, named = objective.per_response, axes.ratio, isinstance(axes.objective, str)
    # Whitening takes mean and std out of what is linear in the rewards alone; discounts make a shift matter.
    whitens = advantage.whitens if axes.whiten is None else axes.whiten
    linear = isinstance(axes.advantage, str) and not advantage.needs_values and axes.gamma == 1
    unscaled = advantage.scale_free or (whitens and linear)
    level = f"ratio={name!r} gives a response one loss" if named else f"{axes.objective!r} gives a response one loss"
    return [
        (
            axes.kl != "none" and axes.kl_coefficient == 0,
            f"kl={axes.kl!r} with kl_coefficient=0 does nothing; set kl: none, or a coefficient above 0.",
        ),
        (
            named and name != "token" and axes.objective != "clipped_ratio",
            f"ratio={name!r} goes with objective='clipped_ratio' alone: {axes.objective!r} is defined token by token. "
            "Set ratio: token.",
        ),
        (
            named and bool(axes.dual_clip) and (axes.objective != "clipped_ratio" or name == "geometric"),
            "dual_clip bounds the loss of objective='clipped_ratio' at ratio token, sequence or sequence_token; here "
            "there is no such loss. Set dual_clip: 0.",
        ),
        (
            whole and not advantage.per_response,
            f"{level}, so the advantage must be one number a response; {axes.advantage!r} has one for each token. Use "
            "ratio: sequence_token, or an advantage that compares whole responses (group_norm, rloo, ...).",
        ),
        (
            whole and axes.aggregation in ("seq_mean_token_sum", "token_sum_norm"),
            f"{level}; aggregation={axes.aggregation!r} would add it once for each token. Use seq_mean_token_mean.",
        ),
        (
            whole and axes.top_entropy_fraction < 1,
            f"{level}: no token of it can be left out. Use ratio: token or sequence_token with top_entropy_fraction.",
        ),
        (
            whole and axes.correction.startswith("token_mask"),
            f"{level}: correction={axes.correction!r} has no token to mask. Use sequence_mask or geometric_mask.",
        ),
        (
            axes.group_filter != "none" and not advantage.compares_group,
            f"group_filter={axes.group_filter!r} leaves out groups of equal rewards, from which advantage="
            f"{axes.advantage!r} learns all the same. Set group_filter: none, or an advantage that compares a group.",
        ),
        (
            axes.normalize_rewards and unscaled and not axes.clip_rewards and "reward" not in axes.kl,
            f"normalize_rewards changes nothing: advantage={axes.advantage!r} does not see the mean or std of rewards.",
        ),
        (
            axes.correction_low is not None and axes.correction.endswith("tis"),
            f"correction={axes.correction!r} truncates from above; there is no correction_low.",
        ),
        (
            axes.correction.endswith("mask") and (axes.correction_low, axes.correction_high) == (0, math.inf),
            f"correction={axes.correction!r} from 0 to infinity masks nothing; set correction: none, or a bound.",
        ),
    ]


def effects(axes: Axes) -> dict[str, tuple[bool, str]]:
    """Of the axes that only some choices on others read: whether these do, and if not why."""
    named = isinstance(axes.objective, str)
    own, corrects = "the objective is a class of its own", axes.correction != "none"
    return {
        "std_epsilon": (axes.advantage == "group_norm", f"only group_norm divides by a std, not {axes.advantage}"),
        "gamma": (axes.advantage in DISCOUNTED, f"only {', '.join(DISCOUNTED)} discount, not {axes.advantage}"),
        "gae_lambda": (axes.advantage == "gae", f"only gae has it, not {axes.advantage}"),
        "ratio": (named, own),
        "clip_low": (named, own),
        "clip_high": (named, own),
        "dual_clip": (named, own),
        "kl_coefficient": (axes.kl != "none", "kl is none"),
        "correction_low": (corrects and not axes.correction.endswith("tis"), f"correction is {axes.correction}"),
        "correction_high": (corrects, "correction is none"),
        "refill_rounds": (axes.group_filter == "refill", f"group_filter is {axes.group_filter}"),
    }
