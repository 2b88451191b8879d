"""Balance: how long ranks wait for each other in an update, with rows where they were sampled and where they balance.

    python benchmarks/balance.py              # seconds; `make balance`
    python benchmarks/balance.py --sample     # draw the lengths anew first: the same again, from a seed

Reads ``benchmarks/results/lengths.json`` and ``attention_cost.json``; writes ``benchmarks/results/balance.json`` and
``docs/balance.md``; exits with 1 where the goal is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightrft.ops import CostModel, busiest_over_mean, loads, micro_steps, split_by_tokens

HERE = Path(__file__).parent
LENGTHS, TIMES = HERE / "results" / "lengths.json", HERE / "results" / "attention_cost.json"
RESULTS, PAGE = HERE / "results" / "balance.json", HERE.parent / "docs" / "balance.md"
GOAL = 1.05
RANKS, RESPONSES = (8, 16, 64), 1024  # of an update
SAMPLES, PROMPTS, LONGEST = 8, 1024, 16384
BUDGETS = (18432, 32768)
# Layers, hidden size, size of the MLP, heads, key and value heads, size of a head, vocabulary: Qwen2.5's.
MODELS = {"0.5B": (24, 896, 4864, 14, 2, 64, 151936), "7B": (28, 3584, 18944, 28, 4, 128, 152064)}
Steps = list[list[list[int]]]


# --- lengths ---------------------------------------------------------------------------------------------------------


def sample() -> dict[str, Any]:
    """Lengths as reasoning runs show them: long-tailed, alike within a group, and many cut at the longest."""
    generator = random.Random(0)
    prompts, responses = [], []
    for _ in range(PROMPTS):
        prompts.append(min(1024, max(32, round(generator.lognormvariate(math.log(150), 0.6)))))
        typical = generator.lognormvariate(math.log(4000), 0.8)
        drawn = [typical * generator.lognormvariate(0.0, 0.5) for _ in range(SAMPLES)]
        responses.append([min(LONGEST, max(16, round(length))) for length in drawn])
    return {"origin": "synthetic: benchmarks/balance.py, sample()", "prompts": prompts, "responses": responses}


def updates() -> list[list[int]]:
    """Tokens of the responses of each update, with their prompts; groups together."""
    found = json.loads(LENGTHS.read_text(encoding="utf-8"))
    tokens = [prompt + one for prompt, group in zip(found["prompts"], found["responses"]) for one in group]
    return [tokens[start : start + RESPONSES] for start in range(0, len(tokens), RESPONSES)]


# --- cost ------------------------------------------------------------------------------------------------------------


def cost_of(model: str) -> CostModel:
    """Derived from the model's shape, as a run does it."""
    layers, hidden, mlp, heads, pairs, size, vocabulary = MODELS[model]
    return CostModel.of_shape(hidden, layers, mlp, heads, pairs, size, vocabulary)


def attention_times() -> dict[str, dict[str, float]]:
    """Of the layers of each model, cost of a pair of tokens: as derived, and as fitted to measured times."""
    measured, found = json.loads(TIMES.read_text(encoding="utf-8")), {}
    for name, (hidden, mlp, heads, pairs, size) in measured["shapes"].items():
        derived = CostModel.of_shape(hidden, 1, mlp, heads, pairs, size, vocabulary=0).attention
        times = {int(length): time for length, time in measured["milliseconds"][name].items()}
        slope, offset = _line(list(times), list(times.values()))
        found[name] = {"derived": derived, "measured": slope / offset}
    return found


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and offset of the least squares."""
    middle, height = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle) * (b - height) for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)
    return slope, height - slope * middle


# --- with and without ------------------------------------------------------------------------------------------------


def where_sampled(lengths: list[int], ranks: int, budget: int) -> Steps:
    """Every rank computes its own rows, in micro-batches even in tokens; ranks with fewer wait."""
    own = len(lengths) // ranks
    parts = [split_by_tokens(lengths[rank * own : (rank + 1) * own], budget) for rank in range(ranks)]
    return [
        [[rank * own + row for row in parts[rank][step]] if step < len(parts[rank]) else [] for rank in range(ranks)]
        for step in range(max(map(len, parts)))
    ]


def measured(costs: Sequence[float], steps: Steps) -> dict[str, float]:
    """The busiest rank over the mean, if ranks wait at the end of the update and if they wait in every micro-step."""
    found = loads(costs, steps)
    totals = [sum(of_rank) for of_rank in zip(*found)]
    return {"rank": max(totals) * len(totals) / sum(totals), "micro_step": busiest_over_mean(found)}


def case(model: str, budget: int, ranks: int, factor: float) -> dict[str, Any]:
    """The worst of all updates; ``factor`` is what attention truly costs over what is derived."""
    cost = cost_of(model)
    dearer = CostModel(cost.attention * factor)
    worst: dict[str, float] = {}
    steps = {"without": 0, "with": 0}
    for lengths in updates():
        costs = [cost(length) for length in lengths]
        plans = {
            "without": where_sampled(lengths, ranks, budget),
            "with": micro_steps(costs, lengths, ranks, budget),
        }
        figures = {name: measured(costs, plan) for name, plan in plans.items()}
        figures["with_at_measured_cost"] = measured([dearer(length) for length in lengths], plans["with"])
        for name, values in figures.items():
            for key, value in values.items():
                worst[f"{name}_{key}"] = max(worst.get(f"{name}_{key}", 0.0), value)
        for name, plan in plans.items():
            steps[name] = max(steps[name], len(plan))
    rounded = {name: round(value, 4) for name, value in worst.items()}
    return {"model": model, "budget": budget, "ranks": ranks, **rounded, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="draw the lengths anew")
    if parser.parse_args().sample:
        LENGTHS.write_text(json.dumps(sample()) + "\n", encoding="utf-8")
    results = compute()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    missed = [one for one in results["cases"] if max(of_goal(one)) > GOAL]
    sys.exit("\n".join(f"missed: {one}" for one in missed) or 0)


def compute() -> dict[str, Any]:
    """Everything the page shows."""
    attention = attention_times()
    factors = {name: one["measured"] / one["derived"] for name, one in attention.items()}
    cases = [case(name, budget, ranks, factors[name]) for name in MODELS for budget in BUDGETS for ranks in RANKS]
    shown = {name: {key: float(f"{value:.3g}") for key, value in one.items()} for name, one in attention.items()}
    return {"attention": shown, "cases": cases}


def of_goal(one: dict[str, Any]) -> list[float]:
    """The figures of a case that must keep the goal."""
    return [value for name, value in one.items() if name.startswith("with_")]


# --- the page --------------------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """The tables in Markdown, with what they show."""
    every = [length for update in updates() for length in update]
    cut = json.loads(LENGTHS.read_text(encoding="utf-8"))["responses"]
    share = sum(one == LONGEST for group in cut for one in group) / sum(map(len, cut))
    about = _ABOUT.format(
        responses=RESPONSES, updates=len(updates()), longest=LONGEST, mean=round(sum(every) / len(every)), share=share
    )
    costs = "\n".join(
        f"| {name} | {one['derived']:.2e} | {one['measured']:.2e} | {one['measured'] / one['derived']:.2f} |"
        for name, one in results["attention"].items()
    )
    rows = "\n".join(_row(one) for one in results["cases"])
    device = json.loads(TIMES.read_text(encoding="utf-8"))["device"]
    return f"{about}\n\n{_HEAD}\n{rows}\n\n{_COST.format(device=device)}\n{costs}\n"


def _row(one: dict[str, Any]) -> str:
    names = ("without_rank", "without_micro_step", "with_rank", "with_micro_step", "with_at_measured_cost_micro_step")
    steps = f"{one['steps']['without']} → {one['steps']['with']}"
    figures = " | ".join(f"{one[name]:.3f}" for name in names)
    return f"| {one['model']} | {one['budget']} | {one['ranks']} | {figures} | {steps} |"


_ABOUT = """# Work spread over ranks

<!-- written by benchmarks/balance.py (`make balance`); change that instead -->

A rank samples whole groups of responses and does with them what compares responses: rewards, advantages, filters. The
forwards and backwards, where the time goes, are done where they balance best: all ranks learn the lengths, find the
same plan, and rows travel there, losses and gradients staying those of the undivided step ([grid](grid.md)). A run logs
`balance/busiest_over_mean` with every update.

A packed sequence of L tokens costs `L + a L²`: linear layers, and attention (padding, with `packing: false`, comes on
top and is not counted). Micro-batches within
`trainer.tokens_per_microbatch` are made by [`lightrft/ops/balance.py`](../lightrft/ops/balance.py): the longest row
first to the micro-batch that lacks most, then exchanges between the fullest and the emptiest. Ranks that shard a model
wait for each other in every micro-step, so micro-batches of like cost run at the same time, and micro-steps that a
longest row fills are filled up to it.

The numbers are the cost of the busiest rank over the mean, 1 being no waiting at all: *update*, if ranks wait for each
other at the end of an update alone (`ddp`); *micro-step*, if they wait in each micro-step (`fsdp2`, `zero3`). Each is
the worst of {updates} updates of {responses} responses. *Own rows*: every rank computes the rows it sampled, split
evenly by tokens. *Balanced*: as above. *At measured cost*: the balanced micro-step, the plan being held against the
attention cost that was measured (below) rather than the derived one it was made with. *Micro-steps*: of an update,
without and with.

The lengths ([`lengths.json`](../benchmarks/results/lengths.json)) are synthetic, drawn once by `sample()` in
[`benchmarks/balance.py`](../benchmarks/balance.py) as reasoning runs show them: log-normal over prompts and within a
group, cut at {longest} tokens, where {share:.0%} of the responses end; {mean} tokens in the mean, prompt included."""

_HEAD = """| model | tokens a micro-batch | ranks | own rows, update | own rows, micro-step | balanced, update \
| balanced, micro-step | at measured cost | micro-steps |
|---|---:|---:|---:|---:|---:|---:|---:|---:|"""

_COST = """## The cost of attention

Derived from counted operations and the shape of the model, per pair of tokens, in units of what the linear layers cost
one token; and fitted to the time of a forward and backward of two of the model's blocks (bfloat16, PyTorch's attention)
on one {device}, rows of 1024 to 16384 tokens
([`benchmarks/attention_cost.py`](../benchmarks/attention_cost.py)). Here without the head, which a run counts too.

| model | derived | measured | ratio |
|---|---:|---:|---:|"""


if __name__ == "__main__":
    main()
