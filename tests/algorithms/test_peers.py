"""Under ``like`` an algorithm is what another project runs by its name: TRL's own code, the equations of the others."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from algorithms.equations import clip, mean, std
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightrft.algorithms import Algorithm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers
from trl_cases import (
    AGREE,
    CASES,
    CUTS,
    DIFFER,
    LONGEST,
    ROWS,
    VERSION,
    Outcome,
    Step,
    batch_of,
    differences,
    make_step,
    ours,
    theirs,
)

try:
    TRL = version("trl")
except PackageNotFoundError:
    TRL = "none"
needs_trl = pytest.mark.skipif(TRL != VERSION, reason=f"compares with TRL {VERSION}, installed is {TRL}: extra peers")

# --- TRL -------------------------------------------------------------------------------------------------------------


@needs_trl
@pytest.mark.parametrize("name", AGREE)
@settings(max_examples=60, deadline=None)  # the first example imports TRL
@given(
    seed=st.integers(0, 10**6),
    samples=st.sampled_from([2, 3, 4, 6]),
    moved=st.sampled_from([0.0, 0.25, 4.0]),
    mismatch=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    spread=st.sampled_from([1.0, 2**-8]),
    equal=st.integers(0, 6),
    cut=st.sampled_from(CUTS),
)
def test_loss_gradient_and_advantages_are_those_of_trl(
    name: str, seed: int, samples: int, moved: float, mismatch: float, spread: float, equal: int, cut: tuple[int, int]
) -> None:
    case = CASES[name]
    moved, mismatch = moved * (not case.on_policy), mismatch * case.corrects
    step = make_step(seed, samples, moved, mismatch, spread, min(equal, ROWS // samples))
    beyond = (step.old - step.rollout).sum(-1).abs().max()
    assume(beyond < 20)  # clamped here, not there
    found = differences(ours(case.algorithm(), step, cut), theirs(name, step, cut, vllm=bool(mismatch)))
    found["loss"] *= case.compares_loss
    assert max(found.values()) <= 1e-6, found


OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"aggregation": "seq_mean_token_mean"}),
    ("grpo", {"clip_low": 0.1}),
    ("grpo", {"dual_clip": 3.0}),
    ("grpo", {"correction": "none"}),
    ("grpo", {"correction_high": 2.0}),
    ("grpo", {"correction_low": 0.5}),
    ("grpo, beta", {"kl": "loss_k3"}),
    ("grpo, beta", {"kl_coefficient": 0.05}),
    ("dr_grpo", {"advantage": "group_mean"}),
    ("dr_grpo", {"aggregation": "seq_mean_token_sum"}),
    ("dapo", {"clip_high": 0.2}),
    ("dapo", {"mask_truncated": False}),
    ("dapo", {"overlong_buffer_fraction": 0.0}),
    ("gspo", {"clip_high": 0.2}),
    ("gspo", {"ratio": "token"}),
    ("gspo", {"aggregation": "token_mean"}),
    ("cispo", {"clip_high": 0.2}),
    ("gmpo", {"clip_low": 0.2}),
    ("rloo", {"kl_coefficient": 0.03}),
    ("rloo", {"aggregation": "seq_mean_token_mean"}),
]


@needs_trl
@pytest.mark.parametrize(("name", "axis"), OTHERWISE)
def test_one_axis_otherwise_is_not_trl(name: str, axis: dict[str, Any]) -> None:
    case = CASES[name]
    furthest = 0.0
    for seed in range(5):
        step = make_step(seed, moved=0.0 if case.on_policy else 1.0, mismatch=0.3 * case.corrects)
        other = theirs(name, step, vllm=case.corrects)
        found = differences(ours(case.algorithm(**axis), step), other)
        furthest = max(furthest, found["gradient"])
        assert differences(ours(case.algorithm(), step), other)["gradient"] <= 1e-6
    assert furthest > 1e-2


@needs_trl
def test_trls_epsilon_beside_the_std_is_not_ours() -> None:
    step = make_step(0, spread=2**-8)
    same = {"aggregation": "token_mean", "kl": "none"}
    assert differences(ours(Algorithm("grpo", **same), step), theirs("grpo", step))["advantages"] > 1e-2  # type: ignore[arg-type]


@needs_trl
@pytest.mark.parametrize("name", [name for name in DIFFER if name.endswith("masked")])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_masked_response_changes_the_denominator_alone(name: str, seed: int) -> None:
    step = make_step(seed)
    left = ROWS - int(step.truncated.sum())
    assert 0 < left < ROWS
    mine, other = ours(CASES[name].algorithm(), step), theirs(name, step)
    scaled = other._replace(loss=other.loss * ROWS / left, gradient=other.gradient * ROWS / left)
    assert max(differences(mine, scaled).values()) <= 1e-6
    assert differences(mine, other)["gradient"] > 1e-2


@needs_trl
@pytest.mark.parametrize("name", [name for name in DIFFER if name.endswith("off policy")])
def test_what_agrees_on_policy_alone_differs_off_policy(name: str) -> None:
    def gradients_differ(moved: float) -> float:
        step = make_step(0, moved=moved)
        return differences(ours(CASES[name].algorithm(), step), theirs(name, step))["gradient"]

    assert gradients_differ(0.0) <= 1e-6 and gradients_differ(0.25) > 1e-2


@needs_trl
def test_equal_rewards_teach_nothing_here_and_rounding_there() -> None:
    step = make_step(0, samples=12)._replace(rewards=torch.full((ROWS,), 0.97))
    there = theirs("grpo", step).advantages.abs().max()
    assert 1e-4 < there < 2e-3
    assert ours(CASES["grpo"].algorithm(), step).advantages.eq(0).all()


def test_the_steps_reach_all_that_is_compared() -> None:
    near, far = [make_step(seed, mismatch=0.3) for seed in range(20)], [make_step(s, moved=4.0) for s in range(20)]
    ratios = torch.cat([(step.log_probs - step.old)[step.mask].exp() for step in near])
    assert (ratios < 0.8).any() and (ratios > 1.28).any() and ratios.sub(1).abs().lt(0.2).any()
    mismatch = torch.cat([(step.old - step.rollout).sum(-1).exp() for step in near])
    assert (mismatch > 3).any() and (mismatch < 3).any()
    assert torch.cat([(step.log_probs - step.old)[step.mask] for step in far]).exp().max() > 1000
    lengths = torch.cat([step.lengths for step in near])
    assert (lengths == 1).any() and (lengths == LONGEST).any() and len(lengths.unique()) > 5
    assert all(step.truncated.any() and not step.truncated.all() for step in near[1:4])
    assert make_step(0, equal=3).rewards.unique().numel() == 1


# --- verl 0.9.1 and OpenRLHF 0.11.2, from what they document ---------------------------------------------------------


class Token(NamedTuple):
    """One token; ``new`` carries the gradient."""

    new: Tensor
    old: float
    ref: float
    a: float


Responses = list[list[Token]]


def with_advantages(step: Step, log_probs: Tensor, advantages: Callable[[list[float]], list[float]]) -> Responses:
    """The step's responses, where ``advantages`` are one a response, of the rewards of its group."""
    rewards, found = step.rewards.tolist(), []
    for first in range(0, ROWS, step.samples):
        for i, a in enumerate(advantages(rewards[first : first + step.samples]), start=first):
            length = int(step.lengths[i])
            rows = zip(log_probs[i, :length], step.old[i].tolist(), step.reference[i].tolist())
            found.append([Token(new, old, ref, a) for new, old, ref in rows])
    return found


def standardized(epsilon: float) -> Callable[[list[float]], list[float]]:
    return lambda scores: [(r - mean(scores)) / (std(scores) + epsilon) for r in scores]


def ppo(t: Token, low: float, high: float, dual: float = math.inf) -> Tensor:
    """Clipped ratio; where the advantage is negative, at most ``dual`` times its size."""
    ratio = (t.new - t.old).exp()
    loss = torch.maximum(-t.a * ratio, -t.a * ratio.clamp(1 - low, 1 + high))
    return loss.clamp_max(-t.a * dual) if t.a < 0 else loss


def k3(t: Token) -> Tensor:
    return (t.ref - t.new).exp() - 1 - (t.ref - t.new)


def over_tokens(responses: Responses, loss: Callable[[Token], Tensor]) -> Tensor:
    return torch.stack([loss(token) for response in responses for token in response]).mean()


def verl_grpo(step: Step, log_probs: Tensor) -> Tensor:
    """Dual clip 3 is always on; tokens of the step are averaged; k3 in the loss with 0.001."""
    responses = with_advantages(step, log_probs, standardized(1e-6))
    return over_tokens(responses, lambda t: ppo(t, 0.2, 0.2, 3.0) + 0.001 * k3(t))


def verl_dapo(step: Step, log_probs: Tensor) -> Tensor:
    """Clip-higher, dual clip 10, the last fifth of the length penalised, groups of equal rewards left out."""
    length = torch.minimum(torch.zeros(ROWS), (0.8 * LONGEST - step.lengths) / (0.2 * LONGEST))
    kept = step.rewards.view(-1, step.samples).std(1).repeat_interleave(step.samples) > 0
    shaped = step._replace(rewards=step.rewards + length.clamp_min(-1))
    responses = with_advantages(shaped, log_probs, standardized(1e-6))
    kept_responses = [response for response, keep in zip(responses, kept) if keep]
    return over_tokens(kept_responses, lambda t: ppo(t, 0.2, 0.28, 10.0))


def verl_gspo(step: Step, log_probs: Tensor) -> Tensor:
    """The response's ratio as value, the token's gradient; mean over responses of the mean over tokens."""
    losses = []
    for response in with_advantages(step, log_probs, standardized(1e-6)):
        of_response = mean([float(t.new.detach()) - t.old for t in response])
        tokens = [t._replace(new=t.new - t.new.detach() + of_response, old=0.0) for t in response]
        losses.append(torch.stack([ppo(t, 3e-4, 4e-4) for t in tokens]).mean())
    return torch.stack(losses).mean()


def openrlhf_grpo(step: Step, log_probs: Tensor) -> Tensor:
    """1e-9 beside the std; tokens are averaged; the KL moved to the loss keeps its weight of 0.01."""
    responses = with_advantages(step, log_probs, standardized(1e-9))
    return over_tokens(responses, lambda t: ppo(t, 0.2, 0.2) + 0.01 * k3(t))


def openrlhf_gspo(step: Step, log_probs: Tensor) -> Tensor:
    """GSPO under PPO's clip."""
    losses = []
    for response in with_advantages(step, log_probs, standardized(1e-9)):
        new = torch.stack([t.new - t.old for t in response]).mean()
        losses.append(ppo(Token(new, 0.0, 0.0, response[0].a), 0.2, 0.2))
    return torch.stack(losses).mean()


def openrlhf_reinforce(step: Step, log_probs: Tensor) -> Tensor:
    """Rewards within 10; minus 0.01 k1 a token; summed up to the end; whitened with the population's variance."""
    responses = with_advantages(step, log_probs, lambda scores: [clip(r, -10.0, 10.0) for r in scores])
    to_go = [
        [response[0].a - 0.01 * math.fsum(t.old - t.ref for t in response[i:]) for i in range(len(response))]
        for response in responses
    ]
    flat = [value for row in to_go for value in row]
    scale = math.sqrt(mean([(value - mean(flat)) ** 2 for value in flat]))
    whitened = [
        [t._replace(a=(value - mean(flat)) / scale) for t, value in zip(*rows)] for rows in zip(responses, to_go)
    ]
    return over_tokens(whitened, lambda t: ppo(t, 0.2, 0.2))


DOCUMENTED: dict[tuple[str, str], tuple[Callable[[Step, Tensor], Tensor], dict[str, Any]]] = {
    ("verl", "grpo"): (verl_grpo, {"moved": 2.0}),
    ("verl", "dapo"): (verl_dapo, {"moved": 4.0, "equal": 1}),
    ("verl", "gspo"): (verl_gspo, {"moved": 0.002}),
    ("openrlhf", "grpo"): (openrlhf_grpo, {"spread": 1e-6}),
    ("openrlhf", "gspo"): (openrlhf_gspo, {"moved": 0.5}),
    ("openrlhf", "reinforce_plus_plus"): (openrlhf_reinforce, {"spread": 8.0, "moved": 0.5}),
}


def distinct(step: Step) -> bool:
    """Whether every group has two rewards, as nobody agrees on what to do with others."""
    return bool((step.rewards.view(-1, step.samples).std(1) > 0).all())


@pytest.mark.parametrize(("project", "preset"), DOCUMENTED)
def test_the_documented_equation_is_what_like_computes(project: Any, preset: Any) -> None:
    equation, options = DOCUMENTED[project, preset]
    steps = [make_step(seed, **options) for seed in range(12)]
    for step in [one for one in steps if distinct(one) or preset == "dapo"][:6]:
        leaf = step.log_probs.clone().requires_grad_()
        loss = equation(step, leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        # Ours whitens with Bessel's correction, OpenRLHF with the population's variance.
        tokens = int(step.mask.sum())
        factor = math.sqrt((tokens - 1) / tokens) if preset == "reinforce_plus_plus" else 1.0
        expected = Outcome(float(loss.detach()) * factor, gradient * factor, torch.zeros(ROWS))
        mine = ours(Algorithm(preset, like=project), step)._replace(advantages=torch.zeros(ROWS))
        found = differences(mine, expected)
        assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize(
    ("project", "preset", "axis"),
    [
        ("verl", "grpo", {"dual_clip": 0.0}),
        ("verl", "grpo", {"aggregation": "seq_mean_token_mean"}),
        ("verl", "grpo", {"kl": "loss_k2"}),
        ("verl", "dapo", {"dual_clip": 3.0}),
        ("verl", "dapo", {"group_filter": "none"}),
        ("verl", "dapo", {"overlong_buffer_fraction": 0.0}),
        ("verl", "gspo", {"dual_clip": 1.0001}),
        ("verl", "gspo", {"aggregation": "token_mean"}),
        ("openrlhf", "grpo", {"kl_coefficient": 0.02}),
        ("openrlhf", "gspo", {"clip_high": 4e-4}),
        ("openrlhf", "reinforce_plus_plus", {"clip_rewards": 0.0}),
        ("openrlhf", "reinforce_plus_plus", {"kl": "none"}),
        ("openrlhf", "reinforce_plus_plus", {"whiten": False}),
    ],
)
def test_one_axis_otherwise_is_another_equation(project: Any, preset: Any, axis: dict[str, Any]) -> None:
    equation, options = DOCUMENTED[project, preset]
    furthest = 0.0
    for step in (make_step(seed, **options) for seed in range(12)):
        if distinct(step) or preset == "dapo":
            leaf = step.log_probs.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(equation(step, leaf), leaf)
            mine = ours(Algorithm(preset, like=project, **axis), step)
            furthest = max(furthest, differences(mine, mine._replace(gradient=gradient))["gradient"])
    assert furthest > 1e-3


def test_openrlhfs_small_epsilon_counts() -> None:
    step = make_step(2, spread=1e-6)
    batches = [batch_of(step), batch_of(step)]
    for batch, like in zip(batches, ("openrlhf", "verl")):
        Algorithm("grpo", like=like).prepare(batch, lambda x: x)  # type: ignore[arg-type]
    assert (batches[0].advantages - batches[1].advantages).abs().max() > 0.1


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_generator_makes_of_the_presets_and_the_measurements() -> None:
    import json

    page, results = peers.PAGE.read_text(encoding="utf-8"), json.loads(peers.RESULTS.read_text(encoding="utf-8"))
    assert peers.filled(page, results) == page, "run: python benchmarks/peers.py --keep"
    assert set(results["worst"]) == set(CASES) and results["trl"] == VERSION
    assert not peers.missed(results["worst"])


def test_the_axes_on_the_page_are_those_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "| `dual_clip` | `0` | `0` | `3` | `0` |" in peers.axes().split("### `grpo`")[1].split("###")[0]
    assert "`clip_low`" not in peers.axes().split("### `grpo`")[1].split("###")[0]
    monkeypatch.setitem(peers.LIKE["verl"], "grpo", peers.PRESETS["grpo"])  # type: ignore[arg-type]
    assert "`dual_clip`" not in peers.axes().split("### `grpo`")[1].split("###")[0]
