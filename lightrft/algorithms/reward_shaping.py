"""What is done to a response's reward before its advantage: a penalty, normalisation, a bound, in this order."""

from __future__ import annotations

from torch import Tensor

from lightrft.ops.moments import Moments


def overlong_penalty(lengths: Tensor, longest: int, buffer: float) -> Tensor:
    """``max(-1, min(0, (longest - buffer - length) / buffer))`` (DAPO, arXiv 2503.14476, equation 13).

    Args:
        lengths: ``[B]`` tokens.
        longest: most tokens a response may have.
        buffer: tokens before that over which the penalty grows from 0 to -1.

    Returns:
        float32 ``[B]``, in [-1, 0].
    """
    return ((longest - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def normalized(rewards: Tensor, moments: Moments) -> Tensor:
    """``(R - mean) / sqrt(var + 1e-8)``, with the mean and (Bessel) variance of all rewards of the run so far.

    0 as long as those are all equal: they have no scale by which another (of a greedy response) could be measured.
    """
    if not moments.variance:
        return rewards.new_zeros(rewards.shape)
    return ((rewards.double() - moments.mean) * (moments.variance + 1e-8) ** -0.5).to(rewards)
