"""What makes no sense or would have no effect is refused with its reason; all that does is accepted."""

from __future__ import annotations

import math
import re
from typing import Any, get_args, get_type_hints

import pytest
from torch import Tensor

from lightrft.algorithms import LIKE, PRESETS, Advantage, Algorithm, Objective
from lightrft.algorithms.combinations import effects
from lightrft.algorithms.presets import Axes
from lightrft.samples import Batch


class PerToken(Objective):
    def __call__(self, log_probs: Tensor, batch: Batch) -> Tensor:
        return -batch.advantages * log_probs


class PerResponse(PerToken):
    per_response = True


class Constant(Advantage):
    def __call__(self, batch: Batch, token_rewards: Tensor) -> Tensor:
        return token_rewards


class Compared(Constant):
    per_response = compares_group = scale_free = True


def refused(says: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        Algorithm(*arguments, **options)


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = {
    "advantage": ("best", "gae, group_norm, group_mean, rloo, reinforce, reinforce_plus_plus"),
    "ratio": ("word", "token, sequence, sequence_token, geometric"),
    "objective": ("dpo", "clipped_ratio, clipped_log_prob, clipped_weight"),
    "aggregation": ("mean", "token_mean, seq_mean_token_mean, seq_mean_token_sum, token_sum_norm"),
    "kl": ("k3", "none, loss_k2, loss_k3, loss_k3_k2, reward_k1, reward_k2, reward_k3"),
    "correction": ("tis", "none, token_tis, sequence_tis, token_mask, sequence_mask, geometric_mask"),
    "group_filter": ("keep", "none, drop, refill"),
}


@pytest.mark.parametrize("axis", NAMES)
def test_an_unknown_name_is_told_the_choices(axis: str) -> None:
    name, choices = NAMES[axis]
    refused(f"{axis}={name!r} is not known; choose one of {choices}", **{axis: name})


def test_an_unknown_preset_or_project_is_told_what_there_is() -> None:
    refused(f"No algorithm is called 'grpp'; choose one of {', '.join(PRESETS)}.", "grpp")
    refused(
        "like='torchtune' is no project whose defaults are known; choose one of trl, verl, openrlhf.", like="torchtune"
    )
    for project in LIKE:
        for missing in set(PRESETS) - set(LIKE[project]):
            refused(
                f"{project} has no {missing}; like={project!r} goes with {', '.join(LIKE[project])}.", missing, project
            )


def test_k1_as_a_loss_is_told_why_it_is_none() -> None:
    refused(
        "kl='loss_k1' is refused: the expected gradient of k1 on policy is 0. Use loss_k2 or loss_k3.", kl="loss_k1"
    )


# --- numbers ---------------------------------------------------------------------------------------------------------

# (preset and what else it needs, number, values out of its range, values at the range's edges)
NUMBERS: list[tuple[dict[str, Any], str, list[float], list[float]]] = [
    ({}, "clip_low", [0.0, -0.1, 1.5], [1.0, 0.001]),
    ({"preset": "gmpo"}, "clip_low", [0.0, -0.1], [1.5, math.inf]),
    ({}, "clip_high", [0.0, -0.1], [0.001, 5.0, math.inf]),
    ({}, "dual_clip", [1.0, 0.5, -3.0, math.inf], [0.0, 1.01]),
    ({}, "drift", [-0.1, math.inf], [0.0, 2.0]),
    ({"preset": "reinforce"}, "gamma", [0.0, 1.1], [1.0, 0.01]),
    ({"preset": "ppo"}, "gae_lambda", [-0.1, 1.1], [0.0, 1.0]),
    ({}, "kl_coefficient", [-0.1, math.inf], [1e-9, 3.0]),
    ({}, "entropy_bonus", [-0.1, math.inf], [0.0, 1.0]),
    ({"correction": "token_mask"}, "correction_low", [-0.1, 1.0], [0.0, 0.99]),
    ({"correction": "token_mask"}, "correction_high", [0.9, -1.0], [1.0, math.inf]),
    ({}, "top_entropy_fraction", [0.0, 1.1], [1.0, 0.01]),
    ({"preset": "dapo"}, "refill_rounds", [0, -1], [1]),
    ({}, "overlong_buffer_fraction", [-0.1, 1.0], [0.0, 0.99]),
    ({}, "clip_rewards", [-1.0, math.inf], [0.0, 0.1]),
]


@pytest.mark.parametrize(("needed", "name", "wrong", "right"), NUMBERS)
def test_a_number_out_of_its_range_is_refused(
    needed: dict[str, Any], name: str, wrong: list[float], right: list[float]
) -> None:
    for value in [*wrong, math.nan]:
        refused(f"{name} is {value}; it must be ", **needed, **{name: value})
    for value in right:
        assert getattr(Algorithm(**needed, **{name: value}).axes, name) == value


# --- combinations ----------------------------------------------------------------------------------------------------

SENSELESS: list[tuple[str, dict[str, Any]]] = [
    ("kl='loss_k3' with kl_coefficient=0 does nothing", {"kl_coefficient": 0.0}),
    ("ratio='sequence' goes with objective='clipped_ratio' alone", {"preset": "cispo", "ratio": "sequence"}),
    (
        "ratio='geometric' goes with objective='clipped_ratio' alone",
        {"preset": "gmpo", "objective": "clipped_log_prob"},
    ),
    ("ratio='sequence_token' goes with", {"preset": "gspo_token", "objective": "clipped_weight"}),
    ("dual_clip bounds the loss of objective='clipped_ratio'", {"preset": "cispo", "dual_clip": 3.0}),
    ("dual_clip bounds the loss of objective='clipped_ratio'", {"preset": "cpgd", "dual_clip": 3.0}),
    ("dual_clip bounds the loss of objective='clipped_ratio'", {"preset": "gmpo", "dual_clip": 3.0}),
    ("ratio='sequence' gives a response one loss, so the advantage must be", {"preset": "gspo", "advantage": "gae"}),
    ("ratio='geometric' gives a response one loss, so the advantage", {"preset": "gmpo", "advantage": "reinforce"}),
    ("Constant has one for each token", {"preset": "gspo", "advantage": Constant()}),
    ("PerResponse gives a response one loss, so the advantage", {"preset": "ppo", "objective": PerResponse()}),
    ("would add it once for each token", {"preset": "gspo", "aggregation": "seq_mean_token_sum"}),
    ("would add it once for each token", {"preset": "gmpo", "aggregation": "token_sum_norm"}),
    ("would add it once for each token", {"preset": "dr_grpo", "objective": PerResponse()}),
    ("no token of it can be left out", {"preset": "gspo", "top_entropy_fraction": 0.2}),
    ("no token of it can be left out", {"preset": "gmpo", "top_entropy_fraction": 0.2}),
    ("correction='token_mask' has no token to mask", {"preset": "gspo", "correction": "token_mask"}),
    ("correction='token_mask_ratio' has no token to mask", {"preset": "gmpo", "correction": "token_mask_ratio"}),
    ("from which advantage='gae' learns all the same", {"preset": "ppo", "group_filter": "drop"}),
    ("from which advantage='remax' learns all the same", {"preset": "dapo", "advantage": "remax"}),
    ("from which advantage=Constant learns", {"advantage": Constant(), "group_filter": "refill"}),
    ("correction='token_tis' truncates from above", {"correction": "token_tis", "correction_low": 0.1}),
    ("correction='sequence_tis' truncates from above", {"correction": "sequence_tis", "correction_low": 0.1}),
    (
        "correction='token_mask' from 0 to infinity masks nothing",
        {"correction": "token_mask", "correction_low": 0.0, "correction_high": math.inf},
    ),
    ("normalize_rewards changes nothing: advantage='group_norm'", {"normalize_rewards": True}),
    ("normalize_rewards changes nothing: advantage=Compared", {"advantage": Compared(), "normalize_rewards": True}),
    (
        "normalize_rewards changes nothing: advantage='reinforce_plus_plus_baseline'",
        {"preset": "reinforce_plus_plus_baseline", "normalize_rewards": True},
    ),
    (
        "normalize_rewards changes nothing: advantage='reinforce_plus_plus'",
        {"preset": "reinforce_plus_plus", "kl": "none", "normalize_rewards": True},
    ),
    (
        "normalize_rewards changes nothing: advantage='group_mean'",
        {"preset": "dr_grpo", "whiten": True, "normalize_rewards": True},
    ),
    (
        "normalize_rewards changes nothing: advantage='remax'",
        {"preset": "remax", "kl": "none", "whiten": True, "normalize_rewards": True},
    ),
]


@pytest.mark.parametrize(("says", "options"), SENSELESS)
def test_a_senseless_combination_is_refused(says: str, options: dict[str, Any]) -> None:
    refused(says, **options)


INEFFECTIVE: list[tuple[str, dict[str, Any]]] = [
    ("gamma=0.9 has no effect: only gae, reinforce, remax discount, not group_norm", {"gamma": 0.9}),
    ("gamma=1.0 has no effect", {"preset": "reinforce_plus_plus", "gamma": 1.0}),
    ("gae_lambda=0.9 has no effect: only gae has it, not remax", {"preset": "remax", "gae_lambda": 0.9}),
    ("ratio='token' has no effect: the objective is a class", {"objective": PerToken(), "ratio": "token"}),
    ("clip_low=0.2 has no effect: the objective is a class", {"objective": PerToken(), "clip_low": 0.2}),
    ("clip_high=0.2 has no effect: the objective is a class", {"objective": PerToken(), "clip_high": 0.2}),
    ("dual_clip=3.0 has no effect: the objective is a class", {"objective": PerToken(), "dual_clip": 3.0}),
    ("kl_coefficient=0.1 has no effect: kl is none", {"preset": "dapo", "kl_coefficient": 0.1}),
    ("kl_coefficient=0.1 has no effect: kl is none", {"kl": "none", "kl_coefficient": 0.1}),
    ("correction_low=0.1 has no effect: correction is none", {"correction_low": 0.1}),
    ("correction_high=2.0 has no effect: correction is none", {"correction_high": 2.0}),
    ("refill_rounds=3 has no effect: group_filter is none", {"refill_rounds": 3}),
    ("refill_rounds=3 has no effect: group_filter is drop", {"group_filter": "drop", "refill_rounds": 3}),
]


@pytest.mark.parametrize(("says", "options"), INEFFECTIVE)
def test_a_choice_without_effect_is_refused(says: str, options: dict[str, Any]) -> None:
    refused(f"{says}", **options)
    with pytest.raises(ValueError, match=r"Remove it\.$"):
        Algorithm(**options)


def test_every_axis_that_only_some_choices_read_is_refused_here() -> None:
    no_option = {"std_epsilon"}
    assert {says.split("=")[0] for says, _ in INEFFECTIVE} == set(effects(Axes())) - no_option


@pytest.mark.parametrize(("says", "options"), [row for row in INEFFECTIVE if len(row[1]) > 1 or "preset" in row[1]])
def test_removing_it_is_enough(says: str, options: dict[str, Any]) -> None:
    Algorithm(**{name: value for name, value in options.items() if name != says.split("=")[0]})


# --- what is accepted ------------------------------------------------------------------------------------------------

# Overrides that go with every preset.
HARMLESS: list[dict[str, Any]] = [
    {"whiten": True},
    {"whiten": False},
    {"clip_low": 0.1},
    {"clip_high": 0.3},
    {"drift": 0.1},
    {"drift": 0.0},
    {"dual_clip": 0.0},
    {"aggregation": "token_mean"},
    {"aggregation": "seq_mean_token_mean"},
    {"kl": "none"},
    *({"kl": kl} for kl in ("loss_k2", "loss_k3", "loss_k3_k2", "reward_k1", "reward_k2", "reward_k3")),
    {"kl": "loss_k2", "kl_coefficient": 0.1},
    {"entropy_bonus": 0.01},
    *({"correction": name} for name in ("none", "token_tis", "sequence_tis", "sequence_mask", "geometric_mask")),
    *({"correction": f"{level}_mask_ratio"} for level in ("sequence", "geometric")),
    {"correction": "sequence_tis", "correction_high": 4.0},
    {"correction": "sequence_mask", "correction_low": 0.1, "correction_high": 4.0},
    {"top_entropy_fraction": 1.0},
    {"group_filter": "none"},
    {"mask_truncated": True},
    {"overlong_buffer_fraction": 0.3},
    {"clip_rewards": 5.0},
    {"clip_rewards": 5.0, "normalize_rewards": True},
    {"normalize_rewards": False},
    {"kl": "reward_k1", "normalize_rewards": True},
    {"objective": PerToken()},
]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_go_with_every_harmless_override(preset: Any) -> None:
    Algorithm(preset)
    for options in HARMLESS:
        axes = Algorithm(preset, **options).axes
        assert {name: getattr(axes, name) for name in options} == options


@pytest.mark.parametrize(("project", "preset"), [(project, name) for project in LIKE for name in LIKE[project]])
def test_so_do_other_projects_defaults(project: Any, preset: Any) -> None:
    for options in HARMLESS:
        axes = Algorithm(preset, project, **options).axes
        assert {name: getattr(axes, name) for name in options} == options


def test_normalisation_is_accepted_wherever_it_changes_something() -> None:
    for options in (
        {"preset": "reinforce"},
        {"preset": "ppo", "kl": "none"},  # values are of another scale
        {"preset": "dr_grpo"},
        {"preset": "rloo", "kl": "none"},
        {"preset": "reinforce_plus_plus"},  # the KL in the reward is not scaled with it
        {"preset": "reinforce_plus_plus", "kl": "none", "whiten": False},
        {"preset": "reinforce_plus_plus_baseline", "whiten": False},
        {"preset": "reinforce", "whiten": True, "gamma": 0.9},  # discounts make a shift matter
        {"advantage": Constant(), "whiten": True},
    ):
        Algorithm(**options, normalize_rewards=True)  # type: ignore[arg-type]


def test_an_objective_of_ones_own_replaces_a_presets_ratio_and_bounds() -> None:
    """Nothing that comes with the preset may stand in its way: it could not be taken back."""
    for arguments in (("gspo",), ("gmpo",), ("grpo", "verl"), ("cispo", "verl")):
        algorithm = Algorithm(*arguments, objective=PerToken())  # type: ignore[arg-type]
        assert isinstance(algorithm.objective, PerToken)
        assert "ratio" not in str(algorithm) and "clip" not in str(algorithm)


def test_bounds_are_those_of_the_correction_that_is_chosen() -> None:
    assert Algorithm("grpo", "trl").correction_bounds == (0.0, 3.0)
    assert Algorithm("grpo", "trl", correction="sequence_mask_ratio").correction_bounds == (0.0, 3.0)
    assert Algorithm("grpo", "trl", correction="token_tis").correction_bounds == (0.0, 2.0)
    assert Algorithm("grpo", "trl", correction="token_mask", correction_high=4.0).correction_bounds == (0.5, 4.0)


def test_an_advantage_of_ones_own_goes_with_what_it_says_of_itself() -> None:
    assert Algorithm("gspo", advantage=Compared()).needs_groups
    assert not Algorithm("grpo", advantage=Constant()).needs_groups
    assert Algorithm("dapo", advantage=Compared()).refill_rounds == 10


def test_every_choice_of_every_axis_is_accepted_somewhere() -> None:
    somewhere: dict[str, dict[str, Any]] = {
        "gae": {"preset": "ppo"},
        "clipped_log_prob": {"preset": "dapo"},
        "clipped_weight": {"preset": "dapo"},
    }
    for axis in NAMES:
        hint = get_type_hints(Axes)[axis]
        names = [name for one in (hint, *get_args(hint)) for name in get_args(one) if isinstance(name, str)]
        assert names
        for name in dict.fromkeys(names):
            assert getattr(Algorithm(**somewhere.get(name, {}), **{axis: name}).axes, axis) == name


def test_bounds_follow_the_form_of_the_loss_unless_they_are_given() -> None:
    def bounds(*preset: Any, **axes: Any) -> tuple[float, float]:
        chosen = Algorithm(*preset, **axes).axes
        return chosen.clip_low, chosen.clip_high

    assert bounds("gspo", ratio="token") == (0.2, 0.2)
    assert bounds("grpo", ratio="sequence_token") == (3e-4, 4e-4)
    assert bounds("grpo", objective="clipped_weight") == (1.0, 4.0)
    assert bounds("gmpo", "verl", ratio="token", clip_high=0.3) == (0.2, 0.3)
    assert bounds("dapo", objective="clipped_ratio") == (0.2, 0.28)
    assert bounds("grpo", ratio="geometric", clip_low=0.1, clip_high=0.1) == (0.1, 0.1)
