"""Presets: what a published algorithm chooses on every axis, by name, and what other projects do under that name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightrft.algorithms.advantages import Advantage, AdvantageName
from lightrft.algorithms.aggregation import Aggregation
from lightrft.algorithms.corrections import Correction
from lightrft.algorithms.kl import KL
from lightrft.algorithms.log_ratios import RatioLevel
from lightrft.algorithms.policy_loss import Objective, ObjectiveName

Preset = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "gspo_token",
    "gmpo",
    "cpgd",
    "cispo",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rloo",
    "remax",
    "ppo",
]
Project = Literal["trl", "verl", "openrlhf"]
GroupFilter = Literal["none", "drop", "refill"]


@dataclass(frozen=True)
class Axes:
    """One choice on each axis, as :class:`lightrft.algorithms.Algorithm` explains them. By default all is off."""

    advantage: AdvantageName | Advantage = "group_norm"
    std_epsilon: float = 1e-6
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten: bool | None = None
    ratio: RatioLevel = "token"
    objective: ObjectiveName | Objective = "clipped_ratio"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    drift: float = 0.0
    aggregation: Aggregation = "seq_mean_token_mean"
    kl: KL = "none"
    kl_coefficient: float = 0.001
    entropy_bonus: float = 0.0
    correction: Correction = "none"
    correction_low: float | None = None
    correction_high: float | None = None
    top_entropy_fraction: float = 1.0
    group_filter: GroupFilter = "none"
    refill_rounds: int = 10
    mask_truncated: bool = False
    overlong_buffer_fraction: float = 0.0
    normalize_rewards: bool = False
    clip_rewards: float = 0.0


OFF: Mapping[str, object] = {
    "whiten": False,
    "dual_clip": 0.0,
    "drift": 0.0,
    "entropy_bonus": 0.0,
    "correction": "none",
    "top_entropy_fraction": 1.0,
    "group_filter": "none",
    "mask_truncated": False,
    "overlong_buffer_fraction": 0.0,
    "normalize_rewards": False,
    "clip_rewards": 0.0,
}
"""The choice on an axis that leaves things as they are."""

_GRPO = Axes(kl="loss_k3")
_GSPO = Axes(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
PRESETS: Mapping[str, Axes] = {
    # arXiv 2402.03300.
    "grpo": _GRPO,
    # arXiv 2503.20783: neither the std nor the response's length divides.
    "dr_grpo": Axes(advantage="group_mean", aggregation="token_sum_norm"),
    # arXiv 2503.14476.
    "dapo": Axes(clip_high=0.28, aggregation="token_mean", group_filter="refill", overlong_buffer_fraction=0.2),
    # arXiv 2507.18071.
    "gspo": _GSPO,
    "gspo_token": replace(_GSPO, ratio="sequence_token"),
    # arXiv 2507.20673.
    "gmpo": Axes(ratio="geometric", clip_low=0.4, clip_high=0.4),
    # arXiv 2505.12504; the weight of the drift is that of the authors' script.
    "cpgd": Axes(advantage="cpgd", objective="clipped_log_prob", drift=0.01),
    # arXiv 2506.13585 gives no lower bound; the upper one, a weight of 5, is that of arXiv 2510.13786.
    "cispo": Axes(objective="clipped_weight", clip_low=1.0, clip_high=4.0, aggregation="token_mean"),
    # Williams 1992.
    "reinforce": Axes(advantage="reinforce", aggregation="token_mean"),
    # arXiv 2501.03262.
    "reinforce_plus_plus": Axes(
        advantage="reinforce_plus_plus", aggregation="token_mean", kl="reward_k1", kl_coefficient=0.01
    ),
    "reinforce_plus_plus_baseline": Axes(
        advantage="reinforce_plus_plus_baseline", aggregation="token_mean", kl="loss_k2", kl_coefficient=0.001
    ),
    # arXiv 2402.14740: the log-prob of a response is the sum over its tokens.
    "rloo": Axes(advantage="rloo", aggregation="seq_mean_token_sum", kl="reward_k1", kl_coefficient=0.03),
    # arXiv 2310.10505.
    "remax": Axes(advantage="remax", aggregation="seq_mean_token_sum", kl="reward_k1", kl_coefficient=0.05),
    # arXiv 1707.06347, with the KL in the reward of arXiv 2203.02155.
    "ppo": Axes(advantage="gae", aggregation="token_mean", kl="reward_k1", kl_coefficient=0.02),
}

# Defaults of TRL 1.16.0 with a vLLM engine; verl 0.9.1; OpenRLHF 0.11.2: the documented recipe of an algorithm where
# the project has one, else what its configuration does when nothing is set. docs/algorithms/peers.md compares them.
_TRL = Axes(std_epsilon=1e-4, correction="sequence_mask_ratio", correction_low=0.0, correction_high=3.0)
_VERL = Axes(dual_clip=3.0, aggregation="token_mean", gae_lambda=1.0)
_VERL_KL_LOSS = replace(_VERL, kl="loss_k2", kl_coefficient=0.001)
_OPENRLHF = Axes(std_epsilon=1e-9, aggregation="token_mean", gae_lambda=1.0)
_OPENRLHF_KL_REWARD = replace(_OPENRLHF, kl="reward_k1", kl_coefficient=0.01, clip_rewards=10.0)

LIKE: Mapping[str, Mapping[str, Axes]] = {
    "trl": {
        "grpo": replace(_TRL, aggregation="token_mean"),
        "dr_grpo": replace(_TRL, aggregation="token_sum_norm"),
        "dapo": replace(
            _TRL, clip_high=0.28, aggregation="token_mean", mask_truncated=True, overlong_buffer_fraction=0.2
        ),
        "gspo": replace(_TRL, ratio="sequence", clip_low=3e-4, clip_high=4e-4),
        "gmpo": Axes(std_epsilon=1e-4, ratio="geometric", clip_low=0.4, clip_high=0.4),
        "cispo": replace(_TRL, objective="clipped_weight", clip_low=1.0, clip_high=4.0, aggregation="token_mean"),
        "rloo": Axes(advantage="rloo", aggregation="seq_mean_token_sum", kl="reward_k1", kl_coefficient=0.05),
    },
    "verl": {
        "grpo": replace(_VERL, kl="loss_k3", kl_coefficient=0.001),
        "dr_grpo": replace(_VERL, advantage="group_mean", aggregation="token_sum_norm"),
        "dapo": replace(_VERL, clip_high=0.28, dual_clip=10.0, group_filter="refill", overlong_buffer_fraction=0.2),
        "gspo": Axes(ratio="sequence_token", clip_low=3e-4, clip_high=4e-4),
        "gmpo": Axes(ratio="geometric", clip_low=0.4, clip_high=0.4),
        "cispo": replace(_VERL, objective="clipped_weight", clip_low=1.0, clip_high=0.2, dual_clip=0.0),
        "rloo": replace(_VERL, advantage="rloo", kl="reward_k1", kl_coefficient=0.001),
        "remax": replace(_VERL, advantage="remax", kl="reward_k1", kl_coefficient=0.001),
        "reinforce_plus_plus": replace(_VERL_KL_LOSS, advantage="reinforce_plus_plus"),
        "reinforce_plus_plus_baseline": replace(_VERL_KL_LOSS, advantage="reinforce_plus_plus_baseline"),
        "ppo": replace(_VERL, advantage="gae"),
    },
    "openrlhf": {
        "grpo": replace(_OPENRLHF, kl="loss_k3", kl_coefficient=0.01),
        "dr_grpo": replace(_OPENRLHF, advantage="group_mean"),
        "dapo": replace(
            _OPENRLHF,
            clip_high=0.27,
            kl="loss_k3",
            kl_coefficient=0.001,
            group_filter="refill",
            correction="token_mask_ratio",
            correction_low=0.5,
            correction_high=5.0,
        ),
        "gspo": replace(_OPENRLHF, ratio="sequence", aggregation="seq_mean_token_mean"),
        "rloo": replace(_OPENRLHF, advantage="rloo"),
        "reinforce_plus_plus": replace(_OPENRLHF_KL_REWARD, advantage="reinforce_plus_plus"),
        "reinforce_plus_plus_baseline": replace(
            _OPENRLHF, advantage="reinforce_plus_plus_baseline", kl="loss_k2", kl_coefficient=1e-5
        ),
        "ppo": replace(_OPENRLHF_KL_REWARD, advantage="gae"),
    },
}
"""By project and preset: the axes under which the project runs what it calls by that name."""


_USUAL_CLIP = {
    ("clipped_ratio", "token"): (0.2, 0.2),
    ("clipped_ratio", "sequence"): (3e-4, 4e-4),
    ("clipped_ratio", "sequence_token"): (3e-4, 4e-4),
    ("clipped_ratio", "geometric"): (0.4, 0.4),
    ("clipped_log_prob", "token"): (0.2, 0.2),
    ("clipped_weight", "token"): (1.0, 4.0),
}


def chosen_axes(base: Axes, given: Mapping[str, Any]) -> Axes:
    """``base`` with the choices of ``given``; bounds that belonged to what is no longer chosen are the new one's."""
    axes = replace(base, **given)
    if axes.correction != base.correction:
        axes = replace(axes, correction_low=None, correction_high=None)
    form = (axes.objective, axes.ratio)
    if form != (base.objective, base.ratio) and isinstance(axes.objective, str) and form in _USUAL_CLIP:
        low, high = _USUAL_CLIP[form]
        axes = replace(axes, clip_low=low, clip_high=high)
    return replace(axes, **given)


def preset_axes(preset: str, like: str | None) -> Axes:
    """The axes of a preset, or of what a project calls by its name.

    Raises:
        ValueError: there is no such preset or project, or the project has no such algorithm; lists what there is.
    """
    if preset not in PRESETS:
        raise ValueError(f"No algorithm is called {preset!r}; choose one of {', '.join(PRESETS)}.")
    if like is None:
        return PRESETS[preset]
    if like not in LIKE:
        raise ValueError(f"like={like!r} is no project whose defaults are known; choose one of {', '.join(LIKE)}.")
    if preset not in LIKE[like]:
        raise ValueError(f"{like} has no {preset}; like={like!r} goes with {', '.join(LIKE[like])}.")
    return LIKE[like][preset]
