"""Gradients of one optimizer step, for many algorithms and ways of cutting it, against the undivided step's.

:func:`measure` is shared by ``benchmarks/grid.py``, which makes the table of every cut, and by
``tests/test_split_invariance.py``, whose few cuts cover every row of it.
"""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from lightning.fabric import Fabric
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lightrft.algorithms import PRESETS, Algorithm, StepTotals, algorithm
from lightrft.algorithms.aggregation import token_weights
from lightrft.learner import Learner
from lightrft.lightning_modules import ActorModule, CriticModule
from lightrft.module import RFTModule
from lightrft.ops import micro_steps, pack
from lightrft.samples import FIRE, Batch, Prompt, Response, Rollout, Sampling
from lightrft.strategies import Roles, Sharding, make_fabric
from lightrft.workload import Workload

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from ranks import on_ranks

TEMPERATURE, LONGEST, VOCABULARY = 0.8, 9, 14
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TOLERANCE = {"32-true": 1e-6, "64-true": 1e-10}
SEEN = 0.01  # a bug on purpose changes the gradient by more than this
PRECISIONS = tuple(TOLERANCE)
# Micro-batches of a rank; "uneven" is a budget for one response or a few short ones: of 2 to 9 trained tokens.
CUTS = {"1": 1, "2": 2, "4": 4, "uneven": 0}
UNEVEN_TOKENS = 11
LAYOUTS = ("packed", "padded")
HEADS = {"plain": 10_000, "chunked": 4}


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One algorithm on one step.

    Attributes:
        preset: of the algorithm.
        axes: further choices.
        shift: how far the policy's weights move between the old log-probs and the step, so that ratios lie on both
            sides of the clip's bounds.
        critic: options of the critic.
        fire: the first tokens were drawn hot.
        kept: responses after this many are dropped.
        wrong: a bug to put in; ``None`` is none.
    """

    preset: str
    axes: dict[str, Any] = field(default_factory=dict)
    shift: float = 0.03
    critic: dict[str, Any] = field(default_factory=dict)
    fire: bool = False
    kept: int | None = None
    wrong: Callable[[], AbstractContextManager[Any]] | None = None

    def algorithm(self) -> Algorithm:
        axes = dict(self.axes)
        kl = axes.get("kl", PRESETS[self.preset].kl)
        # The presets' own weights would hide what the KL's gradient does.
        return Algorithm(self.preset, **({"kl_coefficient": 0.1} if kl != "none" else {}) | axes)  # type: ignore[arg-type]


def local_means() -> Any:
    """The field's bug: each micro-batch and rank divides by its own counts."""

    def wrong(mask: Tensor, aggregation: Any, totals: StepTotals) -> Tensor:
        own = StepTotals(int(mask.sum()), int(mask.any(-1).sum()), totals.max_response_tokens)
        return token_weights(mask, aggregation, own)

    return mock.patch.object(algorithm, "token_weights", wrong)


def local_statistics() -> Any:
    """Each rank whitens, normalises and ranks entropies by what it holds itself."""
    return mock.patch.object(Sharding, "gather", lambda _, values: values.detach().cpu())


def _rows() -> dict[str, Row]:
    # Bounds of 3e-4 nats, and a weight of 5.
    shifts = {"gspo": 1e-3, "gspo_token": 1e-3, "cispo": 0.25}
    rows = {name: Row(name, shift=shifts.get(name, 0.03)) for name in PRESETS}
    for name in ("token_mean", "seq_mean_token_sum", "token_sum_norm"):
        rows[f"grpo, {name}"] = Row("grpo", {"aggregation": name})
    for name in ("loss_k2", "loss_k3_k2", "reward_k1", "reward_k2", "reward_k3"):
        rows[f"grpo, KL {name}"] = Row("grpo", {"kl": name})
    corrections: dict[str, dict[str, Any]] = {
        "token_tis": {},
        "sequence_tis": {},
        "token_mask": {},
        "sequence_mask": {},
        "geometric_mask": {"correction_low": 0.9, "correction_high": 1.1},
    }
    for name, bounds in corrections.items():
        for kind in (name,) if name.endswith("tis") else (name, f"{name}_ratio"):
            rows[f"grpo, {kind}"] = Row("grpo", {"correction": kind, **bounds})
    rows |= {
        "grpo, token_tis, FIRE": Row("grpo", {"correction": "token_tis"}, fire=True),
        "gspo, token_tis": Row("gspo", {"correction": "token_tis"}, shift=1e-3),
        "gspo, sequence_mask": Row("gspo", {"correction": "sequence_mask"}, shift=1e-3),
        "gmpo, token_tis": Row("gmpo", {"correction": "token_tis"}),
        "cpgd, token_tis": Row("cpgd", {"correction": "token_tis"}),
        "cispo, sequence_tis": Row("cispo", {"correction": "sequence_tis", "clip_low": 0.2, "clip_high": 0.2}),
        "ppo, token_mask": Row("ppo", {"correction": "token_mask"}),
        "grpo, top entropy": Row("grpo", {"top_entropy_fraction": 0.5}),
        "gspo_token, top entropy": Row("gspo_token", {"top_entropy_fraction": 0.5}, shift=1e-3),
        "grpo, whitened": Row("grpo", {"whiten": True}),
        "reinforce, whitened, discounted": Row("reinforce", {"whiten": True, "gamma": 0.9}),
        "rloo, rewards normalised and clipped": Row("rloo", {"normalize_rewards": True, "clip_rewards": 0.8}),
        "remax, rewards normalised": Row("remax", {"normalize_rewards": True}),
        "ppo, rewards normalised and clipped": Row("ppo", {"normalize_rewards": True, "clip_rewards": 0.8}),
        "ppo, not whitened, no value clip": Row("ppo", {"whiten": False}, critic={"value_clip": 0.0}),
        "grpo, entropy bonus": Row("grpo", {"entropy_bonus": 0.1}),
        "grpo, dual clip": Row("grpo", {"dual_clip": 1.1}),
        "grpo, truncated masked": Row("grpo", {"mask_truncated": True}),
        "grpo, overlong penalty": Row("grpo", {"overlong_buffer_fraction": 0.5}),
        "grpo, group filter": Row("grpo", {"group_filter": "drop"}),
        "all together": Row("dapo", ALL),
        "all together, half dropped": Row("dapo", ALL, kept=RESPONSES // 2),
        "ppo, half dropped": Row("ppo", kept=RESPONSES // 2),
    }
    for name in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"):
        rows[f"local means, {name}"] = Row("grpo", {"aggregation": name}, wrong=local_means)
    rows["local statistics"] = Row("dapo", ALL, wrong=local_statistics)
    return rows


GROUPS, SAMPLES = 6, 3
RESPONSES = GROUPS * SAMPLES
ALL = {
    "kl": "loss_k3_k2",
    "whiten": True,
    "correction": "token_tis",
    "top_entropy_fraction": 0.5,
    "entropy_bonus": 0.1,
    "dual_clip": 1.1,
    "mask_truncated": True,
    "overlong_buffer_fraction": 0.5,
    "normalize_rewards": True,
    "clip_rewards": 1.0,
    "group_filter": "drop",
}
ROWS = _rows()


# --- the step --------------------------------------------------------------------------------------------------------


def rollout(row: Row) -> Rollout:
    """The step's responses, scored, with the log-probs of an engine whose weights are not quite the trainer's."""
    made = scored(row)
    for (_, response), log_probs in zip(made, engine_log_probs()):
        response.log_probs = log_probs
    return made


def scored(row: Row) -> Rollout:
    """Six prompts of three responses, of 0 to 9 tokens: one dropped, three truncated, a group of equal rewards.

    The same on every rank.
    """
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> Tensor:
        return torch.randint(2, VOCABULARY, (count,), generator=generator)

    lengths = [9, 1, 3, 0, 7, 8, 2, 9, 5, 4, 8, 1, 6, 9, 2, 3, 5, 7]
    rewards = [0.0, 1.0, 0.4, 0.7, -0.5, 2.0, 1.0, 1.0, 1.0, 0.3, 0.9, 0.1, -1.2, 0.6, 0.0, 0.2, 1.5, 0.8]
    prompts = [Prompt(str(i), tokens(2 + i % 3), "") for i in range(GROUPS)]

    def response(length: int, reward: float) -> Response:
        return Response(tokens(length), torch.zeros(length), "", "length" if length == 9 else "stop", reward=reward)

    responses = [response(*one) for one in zip(lengths, rewards)]
    greedy = [response(*one) for one in zip([4, 9, 2, 6, 8, 3], [0.5, 0.1, 1.0, -0.3, 0.7, 0.0])]
    for index, one in enumerate(responses):
        one.dropped = index == 10 or index >= (row.kept or RESPONSES)
    groups = [responses[start : start + SAMPLES] for start in range(0, RESPONSES, SAMPLES)]
    sampling = Sampling(fire=FIRE() if row.fire else None)
    return Rollout(prompts, groups, sampling, greedy if row.algorithm().needs_greedy else [])


@cache
def engine_log_probs() -> tuple[Tensor, ...]:
    """Of every response, in float64 and then rounded: the same for every way of cutting."""
    actor = new_actor(packing=True).double()
    move(actor, 0.06, seed=2)
    found = []
    for prompt, response in scored(Row("grpo")):
        length = len(response.token_ids)
        mask, prompt_length = torch.ones(1, length, dtype=torch.bool), torch.tensor([len(prompt.token_ids)])
        packed = pack([torch.cat([prompt.token_ids, response.token_ids])], prompt_length, mask)
        with torch.no_grad():
            log_probs, _ = actor(*packed.inputs, temperature=TEMPERATURE)
        found.append(log_probs.float())
    return tuple(found)


def move(module: nn.Module, scale: float, seed: int) -> None:
    """Add normal noise to every weight, the same in any precision."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter))


class Recorder(torch.optim.SGD):
    """Keeps the gradient that a step would apply."""

    gradient: Tensor

    def step(self, closure: Any = None) -> None:
        self.gradient = torch.cat([p.grad.flatten().double() for group in self.param_groups for p in group["params"]])


def recorder(parameters: Any) -> Recorder:
    return Recorder(parameters, lr=1.0)


@cache
def tokenizer() -> str:
    """Folder of one that knows every id."""
    folder = tempfile.mkdtemp()
    vocabulary = {str(index): index for index in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0").save_pretrained(folder)
    return folder


@cache
def _actor(packing: bool, dtype: torch.dtype) -> ActorModule:
    torch.manual_seed(0)
    made = ActorModule(config=QWEN2, tokenizer=tokenizer(), packing=packing, optimizer=recorder)
    made.configure_model()
    return made


@cache
def _critic(packing: bool, dtype: torch.dtype) -> CriticModule:
    torch.manual_seed(1)
    made = CriticModule(config=QWEN2, packing=packing, optimizer=recorder)
    made.configure_model()
    move(made, 0.05, seed=4)  # its head starts at 0
    return made


def new_actor(packing: bool) -> ActorModule:
    return copy.deepcopy(_actor(packing, torch.get_default_dtype()))


class Cell(NamedTuple):
    """A way of cutting a step on each rank."""

    cut: str
    layout: str
    head: str


UNDIVIDED = Cell("1", "packed", "plain")


def cells(few: bool, ranks: int, precision: str) -> list[Cell]:
    """Every way; or a few, of which each changes several things at a time."""
    if not few:
        return list(itertools.starmap(Cell, itertools.product(CUTS, LAYOUTS, HEADS)))
    chosen = {
        ("32-true", 1): [UNDIVIDED, Cell("4", "packed", "chunked")],
        ("32-true", 2): [Cell("2", "padded", "plain")],
        ("64-true", 1): [UNDIVIDED, Cell("uneven", "padded", "chunked")],
        ("64-true", 2): [Cell("uneven", "packed", "chunked")],
    }
    return chosen[precision, ranks]


class Step(NamedTuple):
    """What a step did.

    Attributes:
        gradients: of the actor, and of the critic if there is one, flattened, float64.
        metrics: of the step.
        micro_batches: trained tokens of each, on this rank.
    """

    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    micro_batches: list[int]


def step(fabric: Fabric, row: Row, cell: Cell) -> Step:
    """One optimizer step, from the scored rollout on."""
    packing, algorithm = cell.layout == "packed", row.algorithm()
    with fabric.init_module():
        actor = new_actor(packing)
        critic = copy.deepcopy(_critic(packing, torch.get_default_dtype())) if algorithm.needs_values else None
    actor.head_chunk_tokens = HEADS[cell.head]
    if critic is not None:
        for name, value in row.critic.items():
            setattr(critic, name, value)
    module = RFTModule(actor, algorithm, critic=critic)
    module.configure_model()
    if module.reference is not None:
        move(module.reference, 0.06, seed=3)
    learner = Learner(fabric, Roles(fabric, {}), module, tokens_per_microbatch=1, gradient_clip_val=None)
    batch = share(Batch.from_rollout(rollout(row)), fabric)
    with row.wrong() if row.wrong else nullcontext():
        learner.tokens_per_microbatch = budget(learner, batch, CUTS[cell.cut])
        metrics = learner.prepare(batch, TEMPERATURE, LONGEST, len(batch))
        # Off policy: the weights have moved since the old log-probs and values.
        move(actor, row.shift, seed=5)
        if critic is not None:
            move(critic, 0.03, seed=6)
        learner.tokens_per_microbatch = budget(learner, batch, CUTS[cell.cut])  # algorithms leave responses out
        parts = micro_batches(learner, batch)
        metrics |= learner.update(batch, TEMPERATURE, LONGEST)
    trained = {"actor": learner.policy} | ({"critic": learner.critic} if learner.critic else {})
    gradients = {name: one.optimizer.optimizer.gradient for name, one in trained.items()}
    return Step(gradients, metrics, parts)


def share(batch: Batch, fabric: Fabric) -> Batch:
    rows = len(batch) // fabric.world_size
    return batch.select(range(fabric.global_rank * rows, (fabric.global_rank + 1) * rows))


def budget(learner: Learner, batch: Batch, parts: int) -> int:
    """The least with which all trained responses make so many micro-batches a rank; 0 parts: for the uneven cut."""
    if not parts:
        return UNEVEN_TOKENS
    mine = [len(batch.sequences[row]) for row in batch.response_mask.any(-1).nonzero().flatten().tolist()]
    lengths = tuple(length for rank in learner.sharding.everyone(mine) for length in rank)
    costs = tuple(map(learner.cost, lengths))
    return _least_budget(costs, lengths, learner.layout.groups, parts)


@cache  # most rows have the same lengths
def _least_budget(costs: tuple[float, ...], lengths: tuple[int, ...], groups: int, parts: int) -> int:
    return next(n for n in itertools.count(9) if len(micro_steps(list(costs), list(lengths), groups, n)) <= parts)


def micro_batches(learner: Learner, batch: Batch) -> list[int]:
    """Trained tokens of each micro-batch of this rank."""
    work = Workload(batch, learner.cost, learner.tokens_per_microbatch, learner.layout, learner.sharding)
    return [int(part.response_mask.sum()) for part in work.micro_batches]


# --- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One step against the undivided one of its row: packed, one micro-batch, one rank, the head in one piece.

    Attributes:
        precision, row, cut, layout, head: which.
        ranks: that shared it.
        differences: ``||g - g0|| / ||g0||`` of each model's gradient.
        norms: of each model's gradient.
        nonzero: share of each gradient's elements that are not 0.
        micro_batches: trained tokens of each, of every rank.
        metrics: of the step, over all ranks.
    """

    precision: str
    row: str
    cut: str
    layout: str
    head: str
    ranks: int
    differences: dict[str, float]
    norms: dict[str, float]
    nonzero: dict[str, float]
    micro_batches: list[list[int]]
    metrics: dict[str, float]

    def __str__(self) -> str:
        where = f"{self.cut} micro-batches, {self.layout}, {self.head} head, {self.ranks} ranks, {self.precision}"
        return f"{self.row}: {where}"

    @property
    def difference(self) -> float:
        """The largest."""
        return max(self.differences.values())

    @property
    def wrong(self) -> bool:
        """Whether a bug was put in."""
        return ROWS[self.row].wrong is not None

    @property
    def clipped(self) -> float:
        """Share of trained tokens whose gradient a bound stopped."""
        return self.metrics["clip_fraction_low"] + self.metrics["clip_fraction_high"]


def measure(few: bool) -> list[Measured]:
    """Every row on one rank and on two; ``few`` takes the cuts of the test suite."""
    with tempfile.TemporaryDirectory() as folder:
        return [one for ranks in (1, 2) for one in on_ranks(ranks, _on_this_rank, ranks, few, Path(folder))[0]]


def _on_this_rank(ranks: int, few: bool, folder: Path) -> list[Measured]:
    """``folder`` is for the undivided gradients, which a rank alone writes."""
    found: list[Measured] = []
    for precision in PRECISIONS:
        strategy = "ddp" if ranks > 1 else "auto"
        fabric = make_fabric(strategy, precision, accelerator="cpu", devices=ranks)
        fabric.launch()
        found += measured(fabric, precision, few, folder / f"{precision}.pt")
    return found


def measured(fabric: Fabric, precision: str, few: bool, undivided: Path) -> Iterator[Measured]:
    """Every row and cell of one precision; a rank alone writes the undivided gradients, two read them."""
    alone = fabric.world_size == 1
    whole: dict[str, dict[str, Tensor]] = {} if alone else torch.load(undivided)
    for name, row in ROWS.items():
        for cell in cells(few, fabric.world_size, precision):
            done = step(fabric, row, cell)
            if alone and cell == UNDIVIDED:
                whole[name] = done.gradients
            yield Measured(
                precision,
                name,
                *cell,
                fabric.world_size,
                {model: _difference(g, whole[name][model]) for model, g in done.gradients.items()},
                {model: float(g.norm()) for model, g in done.gradients.items()},
                {model: float((g != 0).double().mean()) for model, g in done.gradients.items()},
                Sharding(fabric).everyone(done.micro_batches),
                done.metrics,
            )
    if alone:
        torch.save(whole, undivided)


def _difference(gradient: Tensor, whole: Tensor) -> float:
    return float((gradient - whole).norm() / whole.norm())
