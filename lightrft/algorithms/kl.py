"""Per-token estimators of KL(policy || reference) from samples of the policy (Schulman 2020, blog: KL approximation).

``delta = log_probs - log_probs_reference``, shape ``[B, T]``, nats, at least float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

KL = Literal["none", "loss_k2", "loss_k3", "loss_k3_k2", "reward_k1", "reward_k2", "reward_k3"]
"""Where the KL to the reference goes, and which estimator of it. ``k3_k2`` has the value of k3, the gradient of k2."""


def k1(delta: Tensor) -> Tensor:
    """``delta``: unbiased, high variance, may be negative. As a loss its expected gradient on policy is 0."""
    return delta


def k2(delta: Tensor) -> Tensor:
    """``delta^2 / 2``: biased, and its gradient is that of the true KL on policy."""
    return delta.square() / 2


def k3(delta: Tensor) -> Tensor:
    """``exp(-delta) - 1 + delta``: unbiased, never negative. The exponent is clamped at 80, the value never."""
    return (-delta).clamp_max(80.0).exp() - 1 + delta


def k3_k2(delta: Tensor) -> Tensor:
    """Value of :func:`k3`, gradient of :func:`k2`."""
    gradient = k2(delta)
    return k3(delta).detach() + (gradient - gradient.detach())  # the bracket is exactly 0


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "k3_k2": k3_k2}
