"""The loss of every algorithm is its equation, whatever the step is cut into, and its metrics are those of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from algorithms.equations import clip, k2, k3, mean, ratio_clip
from algorithms.steps import LONGEST, ROWS, Mask, Step, alone, masks, parts_of, ragged, step, summed, totals_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms import PRESETS, Advantage, Algorithm, Objective, StepTotals, resolve_algorithm

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm")
CORRECTIONS = ("token_tis", "sequence_tis", "sequence_mask", "geometric_mask", "sequence_mask_ratio")


class Token(NamedTuple):
    """A trained token's log-probs and advantage."""

    new: float
    old: float
    ref: float
    a: float

    @property
    def d(self) -> float:
        return self.new - self.old

    @property
    def ratio(self) -> float:
        return math.exp(self.d)


Responses = list[list[Token]]


def responses_of(made: Step) -> Responses:
    """Those that have a token."""
    batch = made.batch
    tensors = (made.log_probs, batch.log_probs_old, batch.log_probs_reference, batch.advantages)
    rows = zip(*(ragged(tensor, batch.response_mask) for tensor in tensors))
    return [[Token(*values) for values in zip(*row)] for row in rows if row[0]]


# --- each algorithm's equation ---------------------------------------------------------------------------------------


def per_token(term: Callable[[Token], float]) -> dict[str, Callable[[Responses], float]]:
    """The aggregations of a token's loss."""
    return {
        "token_mean": lambda step: mean([term(token) for response in step for token in response]),
        "seq_mean_token_mean": lambda step: mean([mean([term(token) for token in response]) for response in step]),
        "seq_mean_token_sum": lambda step: mean([sum(term(token) for token in response) for response in step]),
        "token_sum_norm": lambda step: (
            sum(term(t) for response in step for t in response) / max(len(step), 1) / LONGEST
        ),
    }


def ppo_clip(t: Token) -> float:
    return ratio_clip(t.ratio, t.a, 0.2, 0.2)


def gspo(responses: Responses) -> float:
    """-min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A), s = exp(mean_t d); mean over responses."""
    return mean([ratio_clip(math.exp(mean([t.d for t in r])), r[0].a, 3e-4, 4e-4) for r in responses])


def gmpo(responses: Responses) -> float:
    """-mean(exp(mean_t term) A), term = s min(s d, s clip(d, -0.4, 0.4)), s = sign(A)."""
    losses = []
    for response in responses:
        a = response[0].a
        s = 1 if a > 0 else -1
        losses.append(-math.exp(mean([s * min(s * t.d, s * clip(t.d, -0.4, 0.4)) for t in response])) * a)
    return mean(losses)


def cpgd(t: Token) -> float:
    """-min(d A, clip(d, ln 0.8, ln 1.2) A), and the drift exp(d) - 1 - d."""
    return -min(t.d * t.a, clip(t.d, math.log(0.8), math.log(1.2)) * t.a) + 0.01 * (math.exp(t.d) - 1 - t.d)


EQUATIONS: dict[str, Callable[[Responses], float]] = {
    "grpo": per_token(lambda t: ppo_clip(t) + 0.001 * k3(t.new - t.ref))["seq_mean_token_mean"],
    "dr_grpo": per_token(ppo_clip)["token_sum_norm"],
    "dapo": per_token(lambda t: ratio_clip(t.ratio, t.a, 0.2, 0.28))["token_mean"],
    "gspo": gspo,
    "gspo_token": gspo,  # the same value; the gradient is compared below
    "gmpo": gmpo,
    "cpgd": per_token(cpgd)["seq_mean_token_mean"],
    "cispo": per_token(lambda t: -clip(t.ratio, 0.0, 5.0) * t.a * t.new)["token_mean"],
    "reinforce": per_token(ppo_clip)["token_mean"],
    "reinforce_plus_plus": per_token(ppo_clip)["token_mean"],
    "reinforce_plus_plus_baseline": per_token(lambda t: ppo_clip(t) + 0.001 * k2(t.new - t.ref))["token_mean"],
    "rloo": per_token(ppo_clip)["seq_mean_token_sum"],
    "remax": per_token(ppo_clip)["seq_mean_token_sum"],
    "ppo": per_token(ppo_clip)["token_mean"],
}


def far(scale: float, **arguments: Any) -> Step:
    """A step in which the policy has moved by about ``scale`` times 0.6 nats a token."""
    made = step(**arguments)
    return made._replace(log_probs=made.batch.log_probs_old + scale * (made.log_probs - made.batch.log_probs_old))


@pytest.mark.parametrize("preset", PRESETS)
@given(masks, st.integers(0, 99), st.sampled_from([1e-3, 1.0, 4.0]))
def test_the_loss_of_a_preset_is_its_equation(preset: Any, mask: Mask, seed: int, scale: float) -> None:
    made = far(scale, mask=mask, seed=seed)
    loss, metrics = Algorithm(preset).loss(made.log_probs, made.entropy, made.batch, made.totals)
    expected = EQUATIONS[preset](responses_of(made))
    assert float(loss) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert float(metrics["loss"]) == float(loss)


def test_every_preset_has_its_equation_here() -> None:
    assert set(EQUATIONS) == set(PRESETS)


# Whose gradient is not that of its value, because a part of it is detached.
STRAIGHT_THROUGH = {"cispo", "gspo_token"}


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - STRAIGHT_THROUGH))
@pytest.mark.parametrize("seed", [1, 2])
def test_the_gradient_of_a_preset_equals_finite_differences(preset: Any, seed: int) -> None:
    batch, log_probs, entropy, totals = far(0.5, seed=seed)
    algorithm, leaf = Algorithm(preset, entropy_bonus=0.1), log_probs.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return algorithm.loss(x, entropy, batch, totals)[0]

    assert torch.autograd.gradcheck(loss, (leaf,), eps=1e-7, atol=1e-6)


def gradient(algorithm: Algorithm, made: Step) -> Tensor:
    leaf = made.log_probs.clone().requires_grad_()
    (found,) = torch.autograd.grad(algorithm.loss(leaf, made.entropy, made.batch, made.totals)[0], leaf)
    return found


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_gspo_token_has_value_and_gradient_of_gspo_where_the_advantage_is_constant(scale: float) -> None:
    made, algorithms = far(scale), (Algorithm("gspo"), Algorithm("gspo_token"))
    losses = [float(algorithm.loss(*made[1:3], made.batch, made.totals)[0]) for algorithm in algorithms]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(gradient(algorithms[0], made), gradient(algorithms[1], made))


def test_gspo_token_takes_an_advantage_for_each_token() -> None:
    """d loss / d logp_t = -s A_t / T, where nothing is clipped."""
    made = step(((True, True),), [0], advantages=torch.tensor([[1.0, -2.0]]))
    d = (made.log_probs - made.batch.log_probs_old)[0].tolist()
    s = math.exp(mean(d))
    found = gradient(Algorithm("gspo_token", clip_low=0.9, clip_high=9.0), made)
    assert found.tolist() == [pytest.approx([-s * 1.0 / 2, -s * -2.0 / 2])]


def test_cispo_weighs_the_gradient_of_every_log_prob() -> None:
    """d loss / d logp_t = -min(rho, 5) A / tokens, also where the ratio is beyond its bound."""
    made = far(4.0)
    tokens = [t for response in responses_of(made) for t in response]
    expected = [-min(t.ratio, 5.0) * t.a / len(tokens) for t in tokens]
    assert any(t.ratio > 5.0 for t in tokens)
    assert gradient(Algorithm("cispo"), made)[made.batch.response_mask].tolist() == pytest.approx(expected)


def test_cpgd_has_the_gradient_of_the_paper_which_clips_the_log_prob() -> None:
    """-min(logp A, clip(logp, logp_old + ln 0.8, logp_old + ln 1.2) A): the value is shifted, the gradient is not."""
    made = step()
    batch, mask = made.batch, made.batch.response_mask
    leaf = made.log_probs.clone().requires_grad_()
    low, high = batch.log_probs_old + math.log(0.8), batch.log_probs_old + math.log(1.2)
    surrogate = -torch.minimum(leaf * batch.advantages, leaf.clamp(low, high) * batch.advantages)
    means = (surrogate * mask).sum(-1) / mask.sum(-1).clamp_min(1)
    (expected,) = torch.autograd.grad(means.sum() / made.totals.responses, leaf)
    torch.testing.assert_close(gradient(Algorithm("cpgd", drift=0.0), made), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize(("kl", "beta"), [("none", None), ("loss_k2", 0.5), ("loss_k3", 0.02), ("loss_k3_k2", 0.3)])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.4)])
def test_clip_kl_and_aggregation_go_together(how: Any, kl: Any, beta: float | None, low: float, high: float) -> None:
    made = step()
    algorithm = Algorithm(clip_low=low, clip_high=high, aggregation=how, kl=kl, kl_coefficient=beta)
    loss, _ = algorithm.loss(made.log_probs, made.entropy, made.batch, made.totals)

    def term(t: Token) -> float:
        penalty = {"none": 0.0, "loss_k2": k2(t.new - t.ref)}.get(kl, k3(t.new - t.ref))
        return ratio_clip(t.ratio, t.a, low, high) + (beta or 0.0) * penalty

    assert float(loss) == pytest.approx(per_token(term)[how](responses_of(made)), rel=1e-6)


def test_the_straight_through_kl_has_the_gradient_of_k2() -> None:
    made = step()
    straight, plain = (Algorithm(kl=kl, kl_coefficient=0.3) for kl in ("loss_k3_k2", "loss_k2"))  # type: ignore[arg-type]
    torch.testing.assert_close(gradient(straight, made), gradient(plain, made))


def test_the_weight_of_the_kl_may_change_during_the_run() -> None:
    made = step(((True,),), [0], advantages=torch.zeros(1, 1))
    made.batch.log_probs_reference = made.log_probs - 0.3
    algorithm = Algorithm(kl="loss_k2")
    algorithm.kl_coefficient = 7.0
    loss, _ = algorithm.loss(made.log_probs, made.entropy, made.batch, made.totals)
    assert float(loss) == pytest.approx(7 * 0.3**2 / 2, rel=1e-6)


# --- how a step is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@settings(max_examples=30)
@given(masks, st.lists(st.integers(1, 5), max_size=3), st.integers(0, 99), st.sampled_from(AGGREGATIONS))
def test_parts_of_a_step_sum_to_the_whole(preset: Any, mask: Mask, cuts: list[int], seed: int, how: Any) -> None:
    batch, log_probs, entropy, totals = step(mask, seed=seed)
    whole_response = Algorithm(preset).objective.per_response
    algorithm = Algorithm(preset, entropy_bonus=0.1, drift=0.2, aggregation=None if whole_response else how)
    whole, metrics = algorithm.loss(log_probs, entropy, batch, totals)
    parts = [
        algorithm.loss(log_probs[rows], entropy[rows], batch.select(rows), totals) for rows in parts_of(len(mask), cuts)
    ]
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole), rel=1e-12, abs=1e-12)
    expected = {name: pytest.approx(float(value), rel=1e-6, abs=1e-9) for name, value in metrics.items()}
    assert summed([part for _, part in parts]) == expected


def test_counts_of_a_part_alone_would_be_seen() -> None:
    """The field's bug, which the test above holds off: each part divides by its own counts."""
    batch, log_probs, entropy, totals = step(ROWS)
    for how in AGGREGATIONS:
        algorithm = Algorithm(aggregation=how)  # type: ignore[arg-type]
        whole, _ = algorithm.loss(log_probs, entropy, batch, totals)
        parts = [batch.select(rows) for rows in ([0, 1, 2], [3, 4, 5])]
        rows = (slice(0, 3), slice(3, 6))
        losses = [
            algorithm.loss(log_probs[at], entropy[at], part, totals_of(part.response_mask))[0]
            for at, part in zip(rows, parts)
        ]
        assert abs(float(sum(losses)) / 2 - float(whole)) > 1e-4


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_means_over_the_step() -> None:
    batch, log_probs, entropy, totals = step()
    _, metrics = Algorithm().loss(log_probs, entropy, batch, totals)
    trained = batch.response_mask
    ratio = (log_probs - batch.log_probs_old).exp()[trained]
    delta = (log_probs - batch.log_probs_reference)[trained]
    up = (batch.advantages > 0)[trained]
    expected = {
        "entropy": entropy[trained].mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "clip_fraction_high": (up & (ratio > 1.2)).double().mean(),
        "clip_fraction_low": (~up & (ratio < 0.8)).double().mean(),
        "kl/reference": delta.mean(),
        "kl/reference_per_response": delta.sum() / 5,
    }
    assert {name: float(metrics[name]) for name in expected} == {
        name: pytest.approx(float(value), rel=1e-6) for name, value in expected.items()
    }


def clipped(preset: Any, log_ratios: list[float], a: float, **options: Any) -> tuple[float, float]:
    """Fractions that the lower and the upper bound clipped, of a response of these log-ratios."""
    mask = [[True] * len(log_ratios)]
    batch, _, entropy, totals = step(mask, [0], advantages=torch.full((1, len(log_ratios)), a))
    new = batch.log_probs_old + torch.tensor([log_ratios])
    _, metrics = Algorithm(preset, **options).loss(new, entropy, batch, totals)
    return float(metrics["clip_fraction_low"]), float(metrics["clip_fraction_high"])


def test_the_clipped_fractions_are_of_what_the_objective_clips() -> None:
    log = math.log
    assert clipped("grpo", [log(1.5), log(0.5)], 1.0) == (0.0, 0.5)
    assert clipped("grpo", [log(1.5), log(0.5)], -1.0) == (0.5, 0.0)
    assert clipped("grpo", [log(4.0), log(0.9)], -1.0, dual_clip=3.0) == (0.0, 0.5)
    assert clipped("cpgd", [log(1.5), log(0.5)], -1.0) == (0.5, 0.0)
    assert clipped("cispo", [log(6.0), log(0.01)], -1.0) == (0.0, 0.5)
    # Of a sequence all tokens or none; the geometric mean clips each token, in nats.
    assert clipped("gspo", [1.0, -0.99], 1.0) == (0.0, 1.0)
    assert clipped("gmpo", [0.5, 0.3], 1.0) == (0.0, 0.5)
    assert clipped("gmpo", [-0.5, 0.3], -1.0) == (0.5, 0.0)


def test_a_token_that_the_engine_drew_hot_is_no_mismatch() -> None:
    for correction in ("none", "geometric_mask_ratio"):
        batch = step(((True, True),), [0]).batch
        batch.log_probs_rollout = batch.log_probs_old - torch.tensor([[5.0, 0.5]])
        batch.comparable = torch.tensor([[False, True]])
        bounds = {} if correction == "none" else {"correction_high": 9.0}
        metrics = Algorithm(correction=correction, **bounds).prepare(batch, alone)  # type: ignore[arg-type]
        # It is in no sum, and in no denominator.
        assert metrics["kl/rollout"] == pytest.approx(math.exp(0.5) - 1 - 0.5, rel=1e-6)
        weight = 1.0 if correction == "none" else math.exp(0.5)
        assert batch.policy_weights.tolist() == [[pytest.approx(weight)] * 2]
        assert metrics.get("correction/weight_mean", weight) == pytest.approx(weight)


@pytest.mark.parametrize("shape", [(), (4,), (4, 2), (1, 4)])
def test_what_would_be_broadcast_to_others_is_refused(shape: tuple[int, ...]) -> None:
    class Wrong(Objective, Advantage):
        def __call__(self, *args: Any) -> Tensor:
            return torch.ones(shape)

    batch, log_probs, entropy, totals = step([[True] * 4] * 4, [0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"Wrong returned the shape .*; for 4 responses of up to 4 tokens return"):
        Algorithm(objective=Wrong()).loss(log_probs, entropy, batch, totals)
    with pytest.raises(ValueError, match=r"Wrong returned the shape"):
        Algorithm(advantage=Wrong()).prepare(batch, alone)


def test_an_objective_of_ones_own_may_return_its_loss_alone() -> None:
    class Likelihood(Objective):
        def __call__(self, log_probs: Tensor, batch: Any) -> Tensor:
            return -batch.advantages * log_probs

    made = step()
    loss, metrics = Algorithm("dapo", objective=Likelihood()).loss(
        made.log_probs, made.entropy, made.batch, made.totals
    )
    tokens = [t for response in responses_of(made) for t in response]
    assert float(loss) == pytest.approx(mean([-t.a * t.new for t in tokens]), rel=1e-6)
    assert float(metrics["ratio_max"]) == pytest.approx(max(t.ratio for t in tokens))
    assert float(metrics["clip_fraction_low"]) == 0 == float(metrics["clip_fraction_high"])


# --- the edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_lies_outside_the_mask_changes_nothing(preset: Any, poison: float) -> None:
    algorithm, results = Algorithm(preset, entropy_bonus=0.1), []
    for poisoned in (False, True):
        batch, log_probs, entropy, totals = step()
        outside = ~batch.response_mask if poisoned else torch.zeros_like(batch.response_mask)
        for name in ("log_probs_old", "log_probs_reference", "log_probs_rollout", "advantages"):
            setattr(batch, name, getattr(batch, name).masked_fill(outside, poison))
        leaf = log_probs.masked_fill(outside, poison).requires_grad_()
        loss, metrics = algorithm.loss(leaf, entropy.masked_fill(outside, poison), batch, totals)
        (found,) = torch.autograd.grad(loss, leaf)
        numbers = {name: float(value) for name, value in metrics.items()}
        results.append((float(loss.detach()), numbers, found[batch.response_mask].tolist()))
    assert results[0] == results[1]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("which", range(1, 16))
def test_impossible_tokens_leave_everything_finite(preset: Any, which: int) -> None:
    """-inf as log-prob of one token, under any of policy, old policy, reference and engine, alone and together."""
    batch, log_probs, entropy, totals = step()
    names = ("log_probs_old", "log_probs_reference", "log_probs_rollout")
    for tensor in (t for bit, t in enumerate([log_probs, *(getattr(batch, n) for n in names)]) if which >> bit & 1):
        tensor[0, 1] = -math.inf
    for correction in CORRECTIONS:
        algorithm = Algorithm(preset, correction=correction)  # type: ignore[arg-type]
        prepared = algorithm.prepare(batch, lambda values: values)
        leaf = log_probs.float().requires_grad_()
        loss, metrics = algorithm.loss(leaf, entropy, batch, totals)
        loss.backward()
        assert torch.isfinite(leaf.grad).all()
        assert all(math.isfinite(value) for value in [*metrics.values(), *prepared.values()])


@pytest.mark.parametrize("preset", PRESETS)
def test_ratios_out_of_all_bounds_give_finite_numbers(preset: Any) -> None:
    batch, log_probs, entropy, totals = step()
    away = torch.tensor([300.0, -300.0]).repeat(3)[:, None]
    leaf = (log_probs + away * batch.response_mask).float().requires_grad_()
    loss, metrics = Algorithm(preset).loss(leaf, entropy, batch, totals)
    (found,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(found).all() and all(math.isfinite(float(value)) for value in metrics.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_without_a_trained_token_is_zero_and_finite(preset: Any) -> None:
    batch, log_probs, entropy, _ = step([[False] * 3] * 2)
    algorithm, leaf = Algorithm(preset, correction="sequence_tis"), log_probs.requires_grad_()
    prepared = algorithm.prepare(batch, lambda values: values)
    loss, metrics = algorithm.loss(leaf, entropy, batch, StepTotals(0, 0, LONGEST))
    loss.backward()
    assert float(loss.detach()) == 0 and not leaf.grad.any() and not batch.advantages.any()
    assert all(float(value) == 0 for value in [*metrics.values(), *prepared.values()])


# --- names -----------------------------------------------------------------------------------------------------------


def test_an_algorithm_by_name_is_its_preset() -> None:
    for name, axes in PRESETS.items():
        assert resolve_algorithm(name).axes == axes
    grpo = Algorithm()
    assert resolve_algorithm(grpo) is grpo and grpo.axes == PRESETS["grpo"]
    with pytest.raises(ValueError, match=r"'grpp'.*choose one of grpo, dr_grpo"):
        resolve_algorithm("grpp")


def test_what_an_algorithm_needs() -> None:
    def those(need: str) -> set[str]:
        return {name for name in PRESETS if getattr(Algorithm(name), need)}  # type: ignore[arg-type]

    single = {"reinforce", "reinforce_plus_plus", "remax", "ppo"}
    assert those("needs_values") == {"ppo"} and those("needs_greedy") == {"remax"}
    assert those("needs_groups") == set(PRESETS) - single
    no_kl = {"dr_grpo", "dapo", "gspo", "gspo_token", "gmpo", "cpgd", "cispo", "reinforce"}
    assert those("needs_reference") == set(PRESETS) - no_kl
    assert those("refill_rounds") == {"dapo"} and those("whitens") == {
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "ppo",
    }
