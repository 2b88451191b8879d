"""Per-token estimators of KL(policy || reference) from samples of the policy (Schulman 2020, blog: KL approximation).

``delta = log_probs - log_probs_reference``, shape ``[B, T]``, nats, at least float32.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def k1(delta: Tensor) -> Tensor:
    """``delta``: unbiased, high variance, may be negative."""
    return delta


def k2(delta: Tensor) -> Tensor:
    """``delta^2 / 2``: biased, and its gradient is that of the true KL on policy."""
    return delta.square() / 2


def k3(delta: Tensor) -> Tensor:
    """``exp(-delta) - 1 + delta``: unbiased, never negative. The exponent is clamped at 80, the value never."""
    return (-delta).clamp_max(80.0).exp() - 1 + delta


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
