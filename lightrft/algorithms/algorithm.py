"""An algorithm: one choice on each axis, with presets by name."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any, Literal

import torch
from torch import Tensor

from lightrft.algorithms.advantages import Advantage, AdvantageName, Gather, has_spread, named_advantage, whiten
from lightrft.algorithms.aggregation import Aggregation, StepTotals, token_weights, weighted_sum
from lightrft.algorithms.combinations import check_axes, check_choices, effects
from lightrft.algorithms.corrections import (
    BOUNDS,
    Correction,
    correction_weights,
    effective_sample_size,
    response_weights,
)
from lightrft.algorithms.kl import KL, KL_ESTIMATORS
from lightrft.algorithms.log_ratios import RatioLevel, difference, log_ratio
from lightrft.algorithms.policy_loss import (
    ClippedLogProb,
    ClippedRatio,
    ClippedWeight,
    Objective,
    ObjectiveName,
    PolicyTerms,
)
from lightrft.algorithms.policy_loss import (
    drift as drift_penalty,
)
from lightrft.algorithms.presets import OFF, Axes, GroupFilter, Preset, Project, chosen_axes, preset_axes
from lightrft.algorithms.reward_shaping import normalized, overlong_penalty
from lightrft.algorithms.token_filter import top_entropy_mask
from lightrft.algorithms.value_loss import explained_variance, value_loss
from lightrft.ops.moments import Moments
from lightrft.samples import Batch


class Algorithm:
    """What responses are worth and what the policy is trained on: a preset, and the axes on which you choose otherwise.

    An axis left ``None`` is as the preset has it. Choices that make no sense together, and choices without effect, are
    refused with the reason.

    Args:
        preset: the algorithm by name, a row of :data:`lightrft.algorithms.PRESETS`.
        like: the defaults under which ``trl``, ``verl`` or ``openrlhf`` run what they call by that name.
        advantage: ``gae`` (needs a critic), ``group_norm``, ``group_mean``, ``rloo``, ``reinforce``,
            ``reinforce_plus_plus``, ``reinforce_plus_plus_baseline``, ``remax`` or ``cpgd``, or an
            :class:`~lightrft.algorithms.Advantage` of your own.
        gamma: discount a token, of ``gae``, ``reinforce`` and ``remax``.
        gae_lambda: of ``gae``.
        whiten: whiten advantages over the optimizer step; ``None`` does where the advantage is so defined (``gae`` and
            both ``reinforce_plus_plus``).
        ratio: level of the ratio to the old policy: ``token``, ``sequence``, ``sequence_token`` or ``geometric``.
        objective: ``clipped_ratio`` (PPO), ``clipped_log_prob`` (CPGD) or ``clipped_weight`` (CISPO), or an
            :class:`~lightrft.algorithms.Objective` of your own.
        clip_low: how far the ratio may fall below 1 before its gradient stops (``geometric``: its log below 0, nats).
            With another ``ratio`` or ``objective`` than the preset's, the bounds are first those usual with it.
        clip_high: how far it may rise above 1.
        dual_clip: where the advantage is negative, the loss is at most this times its size; 0 is off.
        drift: weight of the penalty ``exp(d) - 1 - d`` of the log-ratio to the old policy; 0 is off.
        aggregation: how token losses become one number (:func:`lightrft.algorithms.token_weights`).
        kl: KL to the reference, in the loss (``loss_k2``, ``loss_k3``, ``loss_k3_k2``) or in the reward (``reward_k1``,
            ``reward_k2``, ``reward_k3``), or ``none``.
        kl_coefficient: weight of that KL; a ``KLController`` callback may adapt it.
        entropy_bonus: weight of the policy's entropy, which is subtracted from the loss; 0 is off.
        correction: weight for the mismatch between engine and trainer, one of
            :data:`lightrft.algorithms.corrections.Correction`.
        correction_low, correction_high: bounds of its ratio; ``None`` takes that correction's own.
        top_entropy_fraction: only this share of a step's tokens, those of highest entropy, carry a policy loss.
        group_filter: ``drop`` leaves out groups whose rewards are all equal; ``refill`` also samples further prompts.
        refill_rounds: most times that further prompts are sampled in an iteration.
        mask_truncated: responses cut at the longest length count in their group's advantage but are not trained on.
        overlong_buffer_fraction: share of the longest length over which a penalty grows to -1; 0 is off.
        normalize_rewards: subtract the run's mean reward and divide by its std.
        clip_rewards: largest size of a reward after that; 0 is off.

    Raises:
        ValueError: an unknown choice, a number out of range, a senseless combination or a choice without effect.
    """

    def __init__(
        self,
        preset: Preset = "grpo",
        like: Project | None = None,
        advantage: AdvantageName | Advantage | None = None,
        gamma: float | None = None,
        gae_lambda: float | None = None,
        whiten: bool | None = None,
        ratio: RatioLevel | None = None,
        objective: ObjectiveName | Objective | None = None,
        clip_low: float | None = None,
        clip_high: float | None = None,
        dual_clip: float | None = None,
        drift: float | None = None,
        aggregation: Aggregation | None = None,
        kl: KL | Literal["loss_k1"] | None = None,
        kl_coefficient: float | None = None,
        entropy_bonus: float | None = None,
        correction: Correction | None = None,
        correction_low: float | None = None,
        correction_high: float | None = None,
        top_entropy_fraction: float | None = None,
        group_filter: GroupFilter | None = None,
        refill_rounds: int | None = None,
        mask_truncated: bool | None = None,
        overlong_buffer_fraction: float | None = None,
        normalize_rewards: bool | None = None,
        clip_rewards: float | None = None,
    ) -> None:
        arguments = locals()
        given = {f.name: arguments[f.name] for f in fields(Axes) if arguments.get(f.name) is not None}
        check_choices(given)
        self.preset, self.like = preset, like
        self.axes = chosen_axes(preset_axes(preset, like), given)
        self.advantage = _advantage(self.axes)
        self.objective = _objective(self.axes)
        check_axes(self.axes, given, self.advantage, self.objective)
        self.kl_coefficient = self.axes.kl_coefficient
        self.whitens = self.advantage.whitens if self.axes.whiten is None else self.axes.whiten
        self._rewards_so_far = Moments()

    def __repr__(self) -> str:
        """Every axis: two algorithms of one text do the same."""
        return ", ".join(f"{f.name}={getattr(self.axes, f.name)!r}" for f in fields(Axes))

    def __str__(self) -> str:
        """The preset, and every axis that has an effect."""
        effective = effects(self.axes)
        axes = {f.name: getattr(self.axes, f.name) for f in fields(Axes)} | {"whiten": self.whitens}
        if self.axes.correction != "none":
            axes |= dict(zip(("correction_low", "correction_high"), self.correction_bounds))
        shown = [
            f"{name} {value}"
            for name, value in axes.items()
            if effective.get(name, (True,))[0] and (name not in OFF or value != OFF[name])
        ]
        return f"{self.preset}{f' like {self.like}' if self.like else ''}: {', '.join(shown)}"

    # --- what it needs -----------------------------------------------------------------------------------------------

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen reference's log-probs enter the loss or the reward."""
        return self.axes.kl != "none"

    @property
    def needs_values(self) -> bool:
        """Whether there must be a critic."""
        return self.advantage.needs_values

    @property
    def needs_greedy(self) -> bool:
        """Whether a greedy response to every prompt is its baseline."""
        return self.advantage.needs_greedy

    @property
    def needs_groups(self) -> bool:
        """Whether a response's advantage comes from comparing it with others to its prompt."""
        return self.advantage.compares_group

    @property
    def refill_rounds(self) -> int:
        """Most times that further prompts are sampled in place of groups of equal rewards; 0 where none are."""
        return self.axes.refill_rounds if self.axes.group_filter == "refill" else 0

    # --- before the update -------------------------------------------------------------------------------------------

    def filter_groups(self, batch: Batch, rewards: Tensor) -> None:
        """Take groups whose rewards are all equal out of the update, where the algorithm asks for it.

        Args:
            batch: whole groups.
            rewards: ``[B]`` before they were shaped.
        """
        if self.axes.group_filter != "none":
            spread = has_spread(rewards, batch.group_ids, batch.response_mask.any(-1))
            batch.response_mask = batch.response_mask & spread[:, None]

    def shape_rewards(self, batch: Batch, longest: int, gather: Gather) -> None:
        """Penalise, normalise and bound the rewards of a whole iteration, in this order and in place.

        Args:
            batch: an iteration's responses on this rank.
            longest: most tokens a response may have.
            gather: joins what all ranks hold.
        """
        axes, valid = self.axes, batch.response_mask.any(-1)
        if axes.overlong_buffer_fraction:
            buffer = axes.overlong_buffer_fraction * longest
            batch.rewards = batch.rewards + overlong_penalty(batch.response_lengths, longest, buffer)
            batch.greedy_rewards = batch.greedy_rewards + overlong_penalty(batch.greedy_lengths, longest, buffer)
        if axes.normalize_rewards:
            self._rewards_so_far = self._rewards_so_far.merged(Moments.of(gather(batch.rewards[valid])))
            batch.rewards = normalized(batch.rewards, self._rewards_so_far)
            batch.greedy_rewards = normalized(batch.greedy_rewards, self._rewards_so_far)
        if axes.clip_rewards:
            batch.rewards = batch.rewards.clamp(-axes.clip_rewards, axes.clip_rewards)
            batch.greedy_rewards = batch.greedy_rewards.clamp(-axes.clip_rewards, axes.clip_rewards)

    def prepare(self, batch: Batch, gather: Gather) -> dict[str, float]:
        """Fill in what one optimizer step needs of all its responses: advantages, returns, masks, weights; in place.

        Args:
            batch: this rank's share of the step, whole groups of it, on the host; log-probs, entropies, values and
                rewards are there.
            gather: joins what all ranks hold, in the order of ranks.

        Returns:
            metrics of the step over all ranks.
        """
        mask = batch.response_mask
        found = self.advantage(batch, self._token_rewards(batch))
        _check_shape(self.advantage, found, mask)
        advantages = torch.where(mask, found, 0.0)
        if self.needs_values:
            batch.returns = torch.where(mask, advantages + batch.values_old, 0.0)
        if self.axes.mask_truncated:
            mask = batch.response_mask = mask & ~batch.truncated[:, None]
        batch.advantages = whiten(advantages, mask, gather) if self.whitens else torch.where(mask, advantages, 0.0)
        step = Moments.of(batch.advantages[mask]).over_ranks(gather)
        metrics = {"advantage/mean": step.mean, "advantage/std": math.sqrt(step.spread / max(step.count, 1))}
        metrics |= {"kl/rollout": self._kl_to_rollout(batch, gather), **self._weigh(batch, gather)}
        if self.needs_values:
            values, returns = gather(batch.values_old[mask]), gather(batch.returns[mask])
            metrics["value/explained_variance"] = explained_variance(values, returns)
        return metrics

    def _token_rewards(self, batch: Batch) -> Tensor:
        """``[B, T]``: minus the weighted KL where it is in the reward; the response's reward on its last token."""
        mask = batch.response_mask
        rewards = torch.zeros_like(batch.log_probs_old)
        if self.axes.kl.startswith("reward"):
            delta = difference(batch.log_probs_old, batch.log_probs_reference)
            rewards = torch.where(mask, -self.kl_coefficient * self._kl_estimate(delta), 0.0)
        rows = mask.any(-1).nonzero().flatten()
        last = mask.shape[1] - 1 - mask[rows].flip(-1).long().argmax(-1)
        rewards[rows, last] += batch.rewards[rows]
        return rewards

    def _kl_to_rollout(self, batch: Batch, gather: Gather) -> float:
        """KL(rollout || trainer) of the sampled tokens: what the engine's arithmetic and truncation cost."""
        mismatch = difference(batch.log_probs_old, batch.log_probs_rollout).clamp(-20.0, 20.0)
        estimate = mismatch.exp() - 1 - mismatch
        return Moments.of(estimate[batch.response_mask & batch.comparable]).over_ranks(gather).mean

    def _kl_estimate(self, delta: Tensor) -> Tensor:
        return KL_ESTIMATORS[self.axes.kl.split("_", 1)[1]](delta)

    def _weigh(self, batch: Batch, gather: Gather) -> dict[str, float]:
        """Fill in ``policy_weights``: the off-policy correction, and 0 for tokens that are filtered out."""
        axes, mask, metrics = self.axes, batch.response_mask, {}
        weights = mask.to(batch.log_probs_old.dtype)
        if axes.correction != "none":
            low, high = self.correction_bounds
            mismatch, seen = difference(batch.log_probs_old, batch.log_probs_rollout), mask & batch.comparable
            weights, bounded = correction_weights(mismatch, seen, axes.correction, low, high)
            if self.objective.per_response:
                weights = response_weights(weights, mask)
            metrics = {
                "correction/weight_mean": Moments.of(weights[seen]).over_ranks(gather).mean,
                "correction/bounded_fraction": Moments.of(bounded[seen]).over_ranks(gather).mean,
                "correction/effective_sample_size": effective_sample_size(gather(weights[seen])),
            }
        if axes.top_entropy_fraction < 1:
            kept = top_entropy_mask(batch.entropy_old, mask, axes.top_entropy_fraction, gather)
            metrics["token_filter/kept_fraction"] = Moments.of(kept[mask]).over_ranks(gather).mean
            weights = weights * kept
        batch.policy_weights = torch.where(mask, weights, 0.0)
        return metrics

    @property
    def correction_bounds(self) -> tuple[float, float]:
        """``(low, high)`` of the correction's ratio."""
        low, high = BOUNDS[self.axes.correction.removesuffix("_ratio")]
        chosen_low, chosen_high = self.axes.correction_low, self.axes.correction_high
        return low if chosen_low is None else chosen_low, high if chosen_high is None else chosen_high

    # --- the update --------------------------------------------------------------------------------------------------

    def loss(
        self, log_probs: Tensor, entropy: Tensor, batch: Batch, totals: StepTotals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This part's share of the optimizer step's policy loss, and its share of the step's metrics.

        Summed over every micro-batch of every rank, loss and metrics are those of the undivided step; of a metric
        whose name ends in ``max`` the largest is.

        Args:
            log_probs: ``[B, T]`` nats under the policy, with gradient, 0 outside the mask.
            entropy: ``[B, T]`` nats, with gradient.
            batch: the part's rows.
            totals: of the whole step.

        Returns:
            scalar loss; metrics as detached scalars.
        """
        weights = token_weights(batch.response_mask, self.axes.aggregation, totals)
        terms = self.objective(log_probs, batch)
        if isinstance(terms, Tensor):
            terms = _unclipped(terms, log_probs, batch)
        _check_shape(self.objective, terms.loss, batch.response_mask)
        parts = {"policy_loss": weighted_sum(terms.loss, weights * batch.policy_weights)}
        loss = parts["policy_loss"]
        for name, coefficient, values in self._penalties(log_probs, entropy, batch):
            parts[name] = weighted_sum(values, weights)
            loss = loss + coefficient * parts[name]
        metrics = {name: value.detach() for name, value in parts.items()} | {"loss": loss.detach()}
        return loss, metrics | self._token_metrics(terms, log_probs.detach(), entropy.detach(), batch, totals)

    def _penalties(self, log_probs: Tensor, entropy: Tensor, batch: Batch) -> list[tuple[str, float, Tensor]]:
        """Name, coefficient and ``[B, T]`` of each further term of the loss."""
        found = []
        if self.axes.kl.startswith("loss"):
            estimate = self._kl_estimate(difference(log_probs, batch.log_probs_reference))
            found.append(("kl_loss", self.kl_coefficient, estimate))
        if self.axes.drift:
            found.append(("drift_loss", self.axes.drift, drift_penalty(log_ratio(log_probs, batch.log_probs_old))))
        if self.axes.entropy_bonus:
            found.append(("entropy_loss", self.axes.entropy_bonus, -entropy))
        return found

    def _token_metrics(
        self, terms: PolicyTerms, log_probs: Tensor, entropy: Tensor, batch: Batch, totals: StepTotals
    ) -> dict[str, Tensor]:
        """Means over the step's tokens (``kl/reference_per_response``: over its responses)."""
        mask, ratio = batch.response_mask, terms.log_ratio.detach().exp().expand_as(batch.log_probs_old)
        per_token = mask.float() / max(totals.tokens, 1)
        metrics = {
            "ratio_mean": weighted_sum(ratio, per_token),
            "ratio_max": torch.where(mask, ratio, 0.0).max(),
            "clip_fraction_low": weighted_sum(terms.clipped_low.float().expand_as(ratio), per_token),
            "clip_fraction_high": weighted_sum(terms.clipped_high.float().expand_as(ratio), per_token),
            "entropy": weighted_sum(entropy, per_token),
        }
        if self.needs_reference:
            delta = difference(log_probs, batch.log_probs_reference)
            metrics["kl/reference"] = weighted_sum(delta, per_token)
            metrics["kl/reference_per_response"] = weighted_sum(delta, mask.float() / max(totals.responses, 1))
        return metrics

    def value_loss(
        self, values: Tensor, batch: Batch, totals: StepTotals, clip: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This part's share of the critic's loss and metrics, aggregated as the policy's.

        Args:
            values: ``[B, T]`` with gradient, 0 outside the mask.
            batch: the part's rows, with ``values_old`` and ``returns``.
            totals: of the whole step.
            clip: how far a value may move from ``values_old``; 0 is no clip.
        """
        weights = token_weights(batch.response_mask, self.axes.aggregation, totals)
        loss = weighted_sum(value_loss(values, batch.values_old, batch.returns, clip), weights)
        per_token = batch.response_mask.float() / max(totals.tokens, 1)
        metrics = {"value/loss": loss.detach(), "value/mean": weighted_sum(values.detach(), per_token)}
        if clip:
            moved = ((values.detach() - batch.values_old).abs() > clip).float()
            metrics["value/clip_fraction"] = weighted_sum(moved, per_token)
        return loss, metrics

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What changes during a run: the KL's weight and the running moments of rewards."""
        return {
            "kl_coefficient": self.kl_coefficient,
            "kl_coefficient_at_start": self.axes.kl_coefficient,
            "rewards_so_far": asdict(self._rewards_so_far),
            "choices": {repr(choice): choice.state_dict() for choice in (self.advantage, self.objective)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; a KL coefficient that is configured anew since then takes effect."""
        if state["kl_coefficient_at_start"] == self.axes.kl_coefficient:
            self.kl_coefficient = state["kl_coefficient"]
        self._rewards_so_far = Moments(**state["rewards_so_far"])
        for choice in (self.advantage, self.objective):
            if repr(choice) in state["choices"]:  # not so for one that is chosen anew
                choice.load_state_dict(state["choices"][repr(choice)])


def _advantage(axes: Axes) -> Advantage:
    if isinstance(axes.advantage, Advantage):
        return axes.advantage
    return named_advantage(axes.advantage, axes.gamma, axes.gae_lambda, axes.std_epsilon)


def _objective(axes: Axes) -> Objective:
    if isinstance(axes.objective, Objective):
        return axes.objective
    if axes.objective == "clipped_log_prob":
        return ClippedLogProb(axes.clip_low, axes.clip_high)
    if axes.objective == "clipped_weight":
        return ClippedWeight(axes.clip_low, axes.clip_high)
    return ClippedRatio(axes.ratio, axes.clip_low, axes.clip_high, axes.dual_clip)


def _check_shape(source: Advantage | Objective, found: Tensor, mask: Tensor) -> None:
    """Raise ``ValueError`` for what would be broadcast to tokens or responses that it is not of."""
    if tuple(found.shape) not in ((len(mask), 1), tuple(mask.shape)):
        raise ValueError(
            f"{type(source).__qualname__} returned the shape {tuple(found.shape)}; for {len(mask)} responses of up to "
            f"{mask.shape[1]} tokens return {tuple(mask.shape)}, or {(len(mask), 1)} for one number a response."
        )


def _unclipped(loss: Tensor, log_probs: Tensor, batch: Batch) -> PolicyTerms:
    """What the metrics show of an objective that says nothing but its loss."""
    never = torch.zeros_like(batch.response_mask)
    return PolicyTerms(loss, log_ratio(log_probs, batch.log_probs_old), never, never)


def resolve_algorithm(algorithm: str | Algorithm) -> Algorithm:
    """The preset of that name, or the algorithm itself.

    Raises:
        ValueError: no preset has the name; lists those that exist.
    """
    return algorithm if isinstance(algorithm, Algorithm) else Algorithm(preset=algorithm)  # type: ignore[arg-type]
