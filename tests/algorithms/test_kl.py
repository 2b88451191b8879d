"""KL estimators equal their equations, and their gradients the derivatives; both are finite at any distance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from algorithms import equations
from hypothesis import given
from hypothesis import strategies as st

from lightrft.algorithms import KL_ESTIMATORS, difference, k1, k2, k3, k3_k2

DERIVATIVES: dict[str, Callable[[float], float]] = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: 1 - math.exp(-d),
    "k3_k2": lambda d: d,
}


def test_the_estimators_go_by_their_names() -> None:
    assert {"k1": k1, "k2": k2, "k3": k3, "k3_k2": k3_k2} == KL_ESTIMATORS


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@given(st.floats(-30, 30))
def test_value_and_gradient(name: str, delta: float) -> None:
    leaf = torch.tensor(delta, dtype=torch.float64, requires_grad=True)
    value = KL_ESTIMATORS[name](leaf)
    value.backward()
    equation = equations.KL[name.split("_")[0]]
    assert float(value.detach()) == pytest.approx(equation(delta), rel=1e-9, abs=1e-9)
    assert float(leaf.grad) == pytest.approx(DERIVATIVES[name](delta), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_gradient_equals_finite_differences(name: str) -> None:
    deltas = torch.linspace(-3, 3, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(KL_ESTIMATORS[name], (deltas,))


def test_k3_is_finite_at_any_distance_and_its_value_is_not_clamped() -> None:
    far = k3(torch.tensor([-1000.0, -80.0, 1000.0]))
    assert torch.isfinite(far).all()
    assert float(far[2]) == pytest.approx(999.0)
    assert float(far[1]) == pytest.approx(math.exp(80.0), rel=1e-5)


@pytest.mark.parametrize("delta", [-1e4, -3.7, 1e-4, 1e4])
def test_the_straight_through_estimate_shows_the_value_of_k3_to_the_last_bit(delta: float) -> None:
    at = torch.tensor(delta)
    assert float(k3_k2(at)) == float(k3(at))


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@pytest.mark.parametrize(("new", "old"), [(-math.inf, -1.0), (-1.0, -math.inf), (-math.inf, -math.inf), (-1e30, -1.0)])
def test_impossible_tokens_have_a_finite_kl_and_gradient(name: str, new: float, old: float) -> None:
    leaf = torch.tensor([new], requires_grad=True)
    value = KL_ESTIMATORS[name](difference(leaf, torch.tensor([old])))
    value.backward()
    assert torch.isfinite(value).all() and torch.isfinite(leaf.grad).all()
    if new == old:
        assert float(value.detach()) == 0 == float(leaf.grad)


def test_k1_on_policy_has_no_expected_gradient_which_is_why_it_is_no_loss() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    gradients = {}
    for name in KL_ESTIMATORS:
        log_probs = logits.log_softmax(-1)
        expected = (log_probs.exp().detach() * KL_ESTIMATORS[name](log_probs - reference)).sum()
        (gradients[name],) = torch.autograd.grad(expected, logits)
    log_probs = logits.log_softmax(-1)
    (true,) = torch.autograd.grad((log_probs.exp() * (log_probs - reference)).sum(), logits)
    assert float(gradients["k1"].abs().max()) < 1e-15
    for name in ("k2", "k3_k2"):  # theirs is that of the KL itself
        torch.testing.assert_close(gradients[name], true)
