"""An algorithm: one choice on each axis, with presets by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightrft.algorithms.advantages import ADVANTAGES, GROUP_ADVANTAGES
from lightrft.algorithms.aggregation import Aggregation, StepTotals, token_weights
from lightrft.algorithms.kl import KL_ESTIMATORS, k1
from lightrft.algorithms.policy_loss import clipped_ratio_loss, log_ratio
from lightrft.samples import Batch

KLInLoss = Literal["none", "k2", "k3"]


class Algorithm:
    """What the responses are worth and what the policy is trained on. The defaults are GRPO (arXiv 2402.03300).

    Args:
        advantage: ``group_norm`` or ``group_mean`` (:mod:`lightrft.algorithms.advantages`).
        clip_low: how far the token ratio may fall below 1 before its gradient stops.
        clip_high: how far it may rise above 1.
        aggregation: how token losses become one number (:func:`lightrft.algorithms.aggregation.token_weights`).
        kl_in_loss: estimator of the KL to the reference that is added to the loss. ``k1`` is refused: its expected
            gradient on policy is 0.
        kl_coefficient: weight of that KL; a ``KLController`` callback may adapt it.

    Raises:
        ValueError: an unknown choice, a coefficient without effect, or a KL without a coefficient.
    """

    def __init__(
        self,
        advantage: str = "group_norm",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        aggregation: Aggregation = "seq_mean_token_mean",
        kl_in_loss: KLInLoss = "k3",
        kl_coefficient: float = 0.001,
    ) -> None:
        _check_choice("advantage", advantage, ADVANTAGES)
        _check_choice("aggregation", aggregation, get_args(Aggregation))
        _check_choice("kl_in_loss", kl_in_loss, get_args(KLInLoss))
        if not 0 < clip_low <= 1 or not clip_high > 0:
            raise ValueError(f"clip_low ({clip_low}) must be in (0, 1] and clip_high ({clip_high}) above 0.")
        if not (kl_coefficient == 0 if kl_in_loss == "none" else 0 < kl_coefficient < math.inf):
            raise ValueError(
                f"kl_in_loss={kl_in_loss!r} does not go with kl_coefficient={kl_coefficient}; for no KL set "
                "kl_in_loss: none and kl_coefficient: 0, otherwise an estimator and a coefficient above 0."
            )
        self.advantage = advantage
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.aggregation: Aggregation = aggregation
        self.kl_in_loss = kl_in_loss
        self.kl_coefficient = kl_coefficient

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen reference's log-probs enter the loss."""
        return self.kl_in_loss != "none"

    @property
    def needs_groups(self) -> bool:
        """Whether a response's advantage comes from comparing it with others to its prompt."""
        return self.advantage in GROUP_ADVANTAGES

    def advantages(self, batch: Batch) -> Tensor:
        """Advantage of every trained token of the iteration's responses: float32 ``[B, T]``, 0 elsewhere."""
        valid = batch.response_mask.any(-1)
        per_response = ADVANTAGES[self.advantage](batch.rewards, batch.group_ids, valid)
        return per_response[:, None] * batch.response_mask

    def loss(
        self, log_probs: Tensor, entropy: Tensor, batch: Batch, totals: StepTotals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This part's share of the optimizer step's loss, and its share of the step's metrics.

        Summed over every micro-batch of every rank, loss and metrics are those of the undivided step.

        Args:
            log_probs: ``[B, T]`` nats under the policy, with gradient, 0 outside the mask.
            entropy: ``[B, T]`` nats.
            batch: the part's rows.
            totals: of the whole step.

        Returns:
            scalar loss; metrics as detached scalars.
        """
        mask = batch.response_mask
        weights = token_weights(mask, self.aggregation, totals)
        d = log_ratio(log_probs, batch.log_probs_old)
        token_loss = clipped_ratio_loss(d, batch.advantages, self.clip_low, self.clip_high)
        metrics = {"policy_loss": _masked_sum(token_loss.detach(), weights)}
        if self.needs_reference:
            kl = KL_ESTIMATORS[self.kl_in_loss](log_probs - batch.log_probs_reference)
            metrics["kl_loss"] = _masked_sum(kl.detach(), weights)
            token_loss = token_loss + self.kl_coefficient * kl
        loss = _masked_sum(token_loss, weights)
        metrics["loss"] = loss.detach()
        return loss, metrics | self._token_metrics(d.detach(), log_probs.detach(), entropy.detach(), batch, totals)

    def _token_metrics(
        self, d: Tensor, log_probs: Tensor, entropy: Tensor, batch: Batch, totals: StepTotals
    ) -> dict[str, Tensor]:
        """Means over the step's tokens (``kl/reference_per_response``: over its responses)."""
        mask, ratio, sign = batch.response_mask, d.exp(), batch.advantages.sign()
        per_token = mask.float() / max(totals.tokens, 1)
        mismatch = batch.log_probs_old - batch.log_probs_rollout
        metrics = {
            "ratio_mean": _masked_sum(ratio, per_token),
            "clip_fraction_low": _masked_sum(((sign < 0) & (ratio < 1 - self.clip_low)).float(), per_token),
            "clip_fraction_high": _masked_sum(((sign > 0) & (ratio > 1 + self.clip_high)).float(), per_token),
            "entropy": _masked_sum(entropy, per_token),
            # KL(rollout || trainer) of the sampled tokens: what the engine's arithmetic and truncation cost.
            "kl/rollout": _masked_sum(mismatch.clamp(-20.0, 20.0).exp() - 1 - mismatch, per_token),
        }
        if self.needs_reference:
            delta = k1(log_probs - batch.log_probs_reference)
            metrics["kl/reference"] = _masked_sum(delta, per_token)
            metrics["kl/reference_per_response"] = _masked_sum(delta, mask.float() / max(totals.responses, 1))
        return metrics


def _masked_sum(values: Tensor, weights: Tensor) -> Tensor:
    """``(values * weights).sum()`` where a masked value, whatever it is, adds exactly 0."""
    return (torch.where(weights != 0, values, 0.0) * weights).sum()


def _check_choice(axis: str, value: str, choices: object) -> None:
    names = sorted(choices)  # type: ignore[call-overload]
    if value not in names:
        raise ValueError(f"{axis}={value!r} is not known; choose one of {', '.join(names)}.")


def grpo() -> Algorithm:
    """GRPO (arXiv 2402.03300): group-normalised advantage, token ratio clipped at 0.2, k3 KL in the loss."""
    return Algorithm()


PRESETS: dict[str, Callable[[], Algorithm]] = {"grpo": grpo}


def resolve_algorithm(algorithm: str | Algorithm) -> Algorithm:
    """The preset of that name, or the algorithm itself.

    Raises:
        ValueError: no preset has the name; lists those that exist.
    """
    if isinstance(algorithm, Algorithm):
        return algorithm
    if algorithm not in PRESETS:
        raise ValueError(
            f"No algorithm is called {algorithm!r}; choose one of {', '.join(sorted(PRESETS))}, or give "
            "class_path: lightrft.algorithms.Algorithm with its axes."
        )
    return PRESETS[algorithm]()
