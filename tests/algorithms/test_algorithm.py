"""An algorithm's loss is its equation, each option enters it as its formula says, and nothing senseless is accepted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightrft.algorithms import Algorithm, StepTotals, resolve_algorithm
from lightrft.samples import Batch

LENGTHS, WIDTH, LONGEST = (3, 1, 0, 4), 4, 10


def step(**changes: Any) -> tuple[Batch, Tensor, StepTotals]:
    """Four responses of two prompts, one of them empty; off policy, away from the reference."""
    generator = torch.Generator().manual_seed(3)

    def noise() -> Tensor:
        return torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)

    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    batch = Batch(
        sequences=[torch.arange(2 + length) for length in LENGTHS],
        prompt_lengths=torch.full((4,), 2),
        response_mask=mask,
        group_ids=torch.tensor([0, 0, 1, 1]),
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        log_probs_rollout=(-1 + 0.3 * noise()) * mask,
        log_probs_old=(-1 + 0.3 * noise()) * mask,
        log_probs_reference=(-1 + 0.3 * noise()) * mask,
        advantages=noise() * mask,
    )
    for name, value in changes.items():
        setattr(batch, name, value)
    return batch, (-1 + 0.3 * noise()) * mask, StepTotals(sum(LENGTHS), 3, LONGEST)


def equation(batch: Batch, log_probs: Tensor, low: float, high: float, kl: str, beta: float, aggregation: str) -> float:
    """The loss of ALGORITHMS' GRPO, token by token, in Python floats."""
    total = 0.0
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            new, old, ref, a = (
                float(x[i, t]) for x in (log_probs, batch.log_probs_old, batch.log_probs_reference, batch.advantages)
            )
            ratio, delta = math.exp(new - old), new - ref
            loss = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            loss += beta * {"none": 0.0, "k2": delta**2 / 2, "k3": math.exp(-delta) - 1 + delta}[kl]
            total += (
                loss
                * {
                    "token_mean": 1 / sum(LENGTHS),
                    "seq_mean_token_mean": 1 / 3 / length,
                    "seq_mean_token_sum": 1 / 3,
                    "token_sum_norm": 1 / 3 / LONGEST,
                }[aggregation]
            )
    return total


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"])
@pytest.mark.parametrize(("kl", "beta"), [("none", 0.0), ("k2", 0.5), ("k3", 0.02)])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.4)])
def test_the_loss_is_its_equation(aggregation: Any, kl: Any, beta: float, low: float, high: float) -> None:
    batch, log_probs, totals = step()
    algorithm = Algorithm(clip_low=low, clip_high=high, aggregation=aggregation, kl_in_loss=kl, kl_coefficient=beta)
    loss, metrics = algorithm.loss(log_probs, torch.ones_like(log_probs), batch, totals)
    assert float(loss) == pytest.approx(equation(batch, log_probs, low, high, kl, beta, aggregation), rel=1e-6)
    assert float(metrics["loss"]) == float(loss)


def test_the_gradient_equals_finite_differences() -> None:
    batch, log_probs, totals = step()
    algorithm = Algorithm(kl_coefficient=0.1)
    entropy = torch.zeros_like(log_probs)
    leaf = log_probs.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: algorithm.loss(x, entropy, batch, totals)[0], (leaf,), eps=1e-7, atol=1e-6
    )


def test_advantages_are_the_groups_and_zero_where_nothing_is_trained() -> None:
    batch, _, _ = step()
    # The empty response is in no group's mean, so the second group is a group of one.
    expected = torch.tensor([0.5, -0.5, 0.0, 0.0])
    for name, scale in (("group_mean", 1.0), ("group_norm", 1 / (math.sqrt(0.5) + 1e-6))):
        advantages = Algorithm(advantage=name).advantages(batch)
        torch.testing.assert_close(advantages, expected[:, None] * scale * batch.response_mask)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_lies_outside_the_mask_adds_exactly_zero(poison: float) -> None:
    clean = Algorithm(kl_coefficient=0.1).loss(*_with_entropy(*step()))
    batch, log_probs, totals = step()
    outside = ~batch.response_mask
    for name in ("log_probs_old", "log_probs_reference", "log_probs_rollout", "advantages"):
        setattr(batch, name, getattr(batch, name).masked_fill(outside, poison))
    leaf = log_probs.masked_fill(outside, poison).requires_grad_()
    loss, metrics = Algorithm(kl_coefficient=0.1).loss(*_with_entropy(batch, leaf, totals))
    assert float(loss) == float(clean[0])
    assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in clean[1].items()}


def test_metrics_are_means_over_the_step() -> None:
    batch, log_probs, totals = step()
    entropy = torch.full_like(log_probs, 1.5)
    _, metrics = Algorithm().loss(log_probs, entropy, batch, totals)
    trained = batch.response_mask
    ratio = (log_probs - batch.log_probs_old).exp()[trained]
    delta = (log_probs - batch.log_probs_reference)[trained]
    x = (batch.log_probs_old - batch.log_probs_rollout)[trained]
    up = (batch.advantages > 0)[trained]
    assert float(metrics["entropy"]) == pytest.approx(1.5)
    assert float(metrics["ratio_mean"]) == pytest.approx(float(ratio.mean()))
    assert float(metrics["clip_fraction_high"]) == pytest.approx(float((up & (ratio > 1.2)).double().mean()))
    assert float(metrics["clip_fraction_low"]) == pytest.approx(float((~up & (ratio < 0.8)).double().mean()))
    assert float(metrics["kl/reference"]) == pytest.approx(float(delta.mean()))
    assert float(metrics["kl/reference_per_response"]) == pytest.approx(float(delta.sum() / 3))
    assert float(metrics["kl/rollout"]) == pytest.approx(float((x.exp() - 1 - x).mean()))


def test_a_step_without_a_trained_token_is_zero_and_finite() -> None:
    batch, log_probs, _ = step()
    batch.response_mask = torch.zeros_like(batch.response_mask)
    leaf = log_probs.requires_grad_()
    loss, metrics = Algorithm().loss(leaf, torch.zeros_like(leaf), batch, StepTotals(0, 0, LONGEST))
    loss.backward()
    assert float(loss) == 0 and not leaf.grad.any()
    assert all(float(value) == 0 for value in metrics.values())
    assert not Algorithm().advantages(batch).any()


def test_presets_by_name() -> None:
    grpo = resolve_algorithm("grpo")
    axes = (grpo.advantage, grpo.clip_low, grpo.clip_high, grpo.aggregation, grpo.kl_in_loss)
    assert axes == ("group_norm", 0.2, 0.2, "seq_mean_token_mean", "k3")
    assert resolve_algorithm(grpo) is grpo
    with pytest.raises(ValueError, match=r"'grpp'.*choose one of grpo"):
        resolve_algorithm("grpp")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"advantage": "best"}, "advantage='best' is not known"),
        ({"aggregation": "mean"}, "aggregation='mean' is not known"),
        ({"kl_in_loss": "k1"}, "kl_in_loss='k1' is not known"),
        ({"kl_in_loss": "none"}, "no effect"),
        ({"kl_coefficient": 0.0}, "no effect"),
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Algorithm(**options)


def _with_entropy(batch: Batch, log_probs: Tensor, totals: StepTotals) -> tuple[Tensor, Tensor, Batch, StepTotals]:
    return log_probs, torch.zeros_like(log_probs), batch, totals
