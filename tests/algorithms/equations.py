"""The page of formulas in Python floats. A step is a list of responses, a response the list of its trained tokens.

Written from the equations alone: no tensors, no masks, no padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Rows = Sequence[Sequence[float]]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def std(values: Sequence[float]) -> float:
    """With Bessel's correction."""
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def k1(delta: float) -> float:
    return delta


def k2(delta: float) -> float:
    return delta**2 / 2


def k3(delta: float) -> float:
    return math.exp(-delta) - 1 + delta


KL: dict[str, Callable[[float], float]] = {"k1": k1, "k2": k2, "k3": k3}


def ratio_clip(ratio: float, a: float, low: float, high: float) -> float:
    """PPO: -min(rho A, clip(rho, 1 - low, 1 + high) A)."""
    return -min(ratio * a, clip(ratio, 1 - low, 1 + high) * a)


# --- advantages, for each response -----------------------------------------------------------------------------------


def others(groups: Sequence[int], lengths: Sequence[int], i: int) -> list[int]:
    """Members of the group of response ``i`` that have a token, itself included."""
    return [j for j, group in enumerate(groups) if group == groups[i] and lengths[j]]


def group_advantages(kind: str, rewards: Sequence[float], groups: Sequence[int], lengths: Sequence[int]) -> list[float]:
    """group_norm, group_mean or rloo; 0 for a group of one and for equal rewards."""
    found = []
    for i, reward in enumerate(rewards):
        members = others(groups, lengths, i)
        scores = [rewards[j] for j in members]
        if not lengths[i] or len(scores) < 2 or max(scores) == min(scores):
            found.append(0.0)
        elif kind == "group_norm":
            found.append((reward - mean(scores)) / (std(scores) + 1e-6))
        elif kind == "group_mean":
            found.append(reward - mean(scores))
        else:
            found.append(reward - mean([rewards[j] for j in members if j != i]))
    return found


# --- advantages, for each token --------------------------------------------------------------------------------------


def token_rewards(rewards: Sequence[float], old: Rows, reference: Rows, beta: float, kind: str | None) -> Rows:
    """r_t = -beta k_t, plus R on the last token."""
    found = []
    for reward, olds, refs in zip(rewards, old, reference):
        row = [-beta * KL[kind](o - r) if kind else 0.0 for o, r in zip(olds, refs)]
        if row:
            row[-1] += reward
        found.append(row)
    return found


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t, and V after the last 0."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following)]
    return [math.fsum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]


def rewards_to_go(rewards: Sequence[float], gamma: float) -> list[float]:
    """Sum over s >= t of gamma^(s - t) r_s."""
    return [math.fsum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]


def whiten(rows: Rows) -> Rows:
    """(A - mean) rsqrt(var + 1e-8) over all tokens; 0 for fewer than two, and for equal ones."""
    step = [a for row in rows for a in row]
    if len(step) < 2 or max(step) == min(step):
        return [[0.0] * len(row) for row in rows]
    middle, scale = mean(step), 1 / math.sqrt(std(step) ** 2 + 1e-8)
    return [[(a - middle) * scale for a in row] for row in rows]


# --- from token losses to one number ---------------------------------------------------------------------------------


def aggregate(losses: Rows, how: str, longest: int) -> float:
    present = [row for row in losses if row]
    if not present:
        return 0.0
    if how == "token_mean":
        return mean([loss for row in present for loss in row])
    if how == "seq_mean_token_mean":
        return mean([mean(row) for row in present])
    if how == "seq_mean_token_sum":
        return mean([math.fsum(row) for row in present])
    return math.fsum(loss for row in present for loss in row) / (len(present) * longest)
