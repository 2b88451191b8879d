"""From per-token losses to one number: weights whose denominators are those of the whole optimizer step.

Splitting a step into micro-batches or over ranks then changes no gradient: each part is a plain sum with the same
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"]


@dataclass(frozen=True)
class StepTotals:
    """Sizes of a whole optimizer step, over all micro-batches of all ranks.

    Attributes:
        tokens: trained tokens.
        responses: responses with at least one trained token.
        max_response_tokens: the configured longest response, the constant divisor of ``token_sum_norm``.
    """

    tokens: int
    responses: int
    max_response_tokens: int


def token_weights(mask: Tensor, aggregation: Aggregation, totals: StepTotals) -> Tensor:
    """Weight of each token's loss, so that ``(weights * loss).sum()`` over the step's parts is the aggregate.

    - ``token_mean``: mean over the step's tokens (DAPO, arXiv 2503.14476).
    - ``seq_mean_token_mean``: mean over responses of the mean over their tokens (GRPO, arXiv 2402.03300).
    - ``seq_mean_token_sum``: mean over responses of the sum over their tokens.
    - ``token_sum_norm``: sum over tokens / (responses x ``max_response_tokens``) (Dr.GRPO, arXiv 2503.20783).

    Args:
        mask: bool ``[B, T]`` of trained tokens; an all-``False`` row counts in no denominator.
        aggregation: see above.
        totals: of the whole step.

    Returns:
        float32 ``[B, T]``, 0 outside ``mask``.
    """
    weights = mask.float()
    if aggregation == "token_mean":
        return weights / max(totals.tokens, 1)
    weights = weights / max(totals.responses, 1)
    if aggregation == "seq_mean_token_mean":
        return weights / mask.sum(-1, keepdim=True).clamp_min(1)
    if aggregation == "token_sum_norm":
        return weights / totals.max_response_tokens
    return weights


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """``(values * weights).sum()`` where a value of weight 0, whatever it is, adds exactly 0."""
    return (torch.where(weights != 0, values, 0.0) * weights).sum()
