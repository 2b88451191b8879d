"""An algorithm's loss is its equation, each option enters it as its formula says, and nothing senseless is accepted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"])
@pytest.mark.parametrize(("kl", "beta"), [("none", 0.0), ("k2", 0.5), ("k3", 0.1)])
def test_the_gradient_equals_finite_differences(aggregation: Any, kl: Any, beta: float) -> None:
    batch, log_probs, totals = step()
    algorithm = Algorithm(aggregation=aggregation, kl_in_loss=kl, kl_coefficient=beta)
    entropy = torch.zeros_like(log_probs)
    leaf = log_probs.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: algorithm.loss(x, entropy, batch, totals)[0], (leaf,), eps=1e-7, atol=1e-6
    )


def test_a_ratio_beyond_its_bound_has_no_gradient_where_the_advantage_pushes_on() -> None:
    batch, _, totals = step()
    algorithm = Algorithm(clip_low=0.1, clip_high=0.4, kl_in_loss="none", kl_coefficient=0.0)
    for ratio, advantage, moves in (
        (1.3, 1.0, True), (1.5, 1.0, False), (1.5, -1.0, True),
        (0.95, -1.0, True), (0.8, -1.0, False), (0.8, 1.0, True),
    ):  # fmt: skip
        batch.advantages = torch.full((4, WIDTH), advantage)
        leaf = (batch.log_probs_old + math.log(ratio)).requires_grad_()
        algorithm.loss(leaf, torch.zeros(4, WIDTH), batch, totals)[0].backward()
        assert bool(leaf.grad[batch.response_mask].all() if moves else not leaf.grad.any())


@given(
    lengths=st.lists(st.integers(0, WIDTH), min_size=2, max_size=8),
    cuts=st.lists(st.integers(1, 7), max_size=3),
    aggregation=st.sampled_from(["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"]),
)
def test_parts_of_a_step_sum_to_the_whole(lengths: list[int], cuts: list[int], aggregation: Any) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.arange(WIDTH) < torch.tensor(lengths)[:, None]
    noise = {
        name: torch.randn(mask.shape, generator=generator, dtype=torch.float64)
        for name in ("log_probs_rollout", "log_probs_old", "log_probs_reference", "advantages")
    }
    batch = Batch(
        sequences=[torch.arange(2 + length) for length in lengths],
        prompt_lengths=torch.full((len(lengths),), 2),
        response_mask=mask,
        group_ids=torch.zeros(len(lengths), dtype=torch.int64),
        rewards=torch.zeros(len(lengths)),
        **noise,
    )
    log_probs = noise["log_probs_old"] + 0.3 * noise["advantages"].roll(1)
    totals = StepTotals(sum(lengths), sum(map(bool, lengths)), LONGEST)
    algorithm = Algorithm(aggregation=aggregation, kl_coefficient=0.1)
    whole, metrics = algorithm.loss(log_probs, log_probs, batch, totals)
    bounds = [0, *sorted({cut for cut in cuts if cut < len(lengths)}), len(lengths)]
    parts = []
    for start, end in itertools.pairwise(bounds):
        rows = list(range(start, end))
        parts.append(algorithm.loss(log_probs[rows], log_probs[rows], batch.select(rows), totals))
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole), rel=1e-12, abs=1e-12)
    for name, value in metrics.items():
        assert float(sum(part[name] for _, part in parts)) == pytest.approx(float(value), rel=1e-6, abs=1e-12)


def test_advantages_are_the_groups_and_zero_where_nothing_is_trained() -> None:
    batch, _, _ = step()
    # The empty response is in no group's mean, so the second group is a group of one.
    expected = torch.tensor([0.5, -0.5, 0.0, 0.0])
    for name, scale in (("group_mean", 1.0), ("group_norm", 1 / (math.sqrt(0.5) + 1e-6))):
        advantages = Algorithm(advantage=name).advantages(batch)
        torch.testing.assert_close(advantages, expected[:, None] * scale * batch.response_mask)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_lies_outside_the_mask_adds_exactly_zero(poison: float) -> None:
    algorithm, results = Algorithm(kl_coefficient=0.1), []
    for poisoned in (False, True):
        batch, log_probs, totals = step()
        outside = ~batch.response_mask if poisoned else torch.zeros_like(batch.response_mask)
        for name in ("log_probs_old", "log_probs_reference", "log_probs_rollout", "advantages"):
            setattr(batch, name, getattr(batch, name).masked_fill(outside, poison))
        leaf = log_probs.masked_fill(outside, poison).requires_grad_()
        loss, metrics = algorithm.loss(leaf, torch.zeros_like(leaf).masked_fill(outside, poison), batch, totals)
        (gradient,) = torch.autograd.grad(loss, leaf)
        numbers = {name: float(value) for name, value in metrics.items()}
        results.append((float(loss.detach()), numbers, gradient[batch.response_mask].tolist()))
    assert results[0] == results[1]


def test_ratios_out_of_all_bounds_give_finite_numbers() -> None:
    batch, log_probs, totals = step()
    far = torch.tensor([300.0, -300.0]).repeat(2)[:, None]
    leaf = (log_probs + far * batch.response_mask).requires_grad_()
    loss, metrics = Algorithm(kl_in_loss="k2").loss(leaf, torch.zeros_like(leaf), batch, totals)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(gradient).all() and all(math.isfinite(float(value)) for value in metrics.values())


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
        ({"kl_in_loss": "none"}, "does not go with kl_coefficient=0.001"),
        ({"kl_coefficient": 0.0}, "does not go with kl_coefficient=0.0"),
        ({"kl_coefficient": -0.1}, "coefficient above 0"),
        ({"kl_coefficient": math.nan}, "coefficient above 0"),
        ({"kl_coefficient": math.inf}, "coefficient above 0"),
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"clip_high": 0.0}, "clip_high"),
        ({"clip_low": math.nan}, "clip_low"),
        ({"clip_high": math.nan}, "clip_high"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Algorithm(**options)
