"""One optimizer step by TRL's own code and by ours, on the same tensors: loss, gradient, advantages.

Shared by ``benchmarks/peers.py``, which makes the table, and by ``tests/algorithms/test_peers.py``. TRL's trainers are
built around a model that never runs: generation, rewards and log-probs are given, what TRL makes of them is its own.
All is in float64.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: TRL reports its use otherwise

import torch
from torch import Tensor

from lightrft.algorithms import Algorithm, StepTotals
from lightrft.algorithms.aggregation import token_weights
from lightrft.samples import Batch

VERSION = "1.16.0"
LONGEST, ROWS = 10, 12
EOS, INSIDE, FIRST_PROMPT = 1, 2, 3


# --- the data --------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Responses of one optimizer step; groups are of ``samples`` neighbours, padding is 0."""

    lengths: Tensor
    truncated: Tensor
    samples: int
    rewards: Tensor
    log_probs: Tensor
    old: Tensor
    reference: Tensor
    rollout: Tensor

    @property
    def mask(self) -> Tensor:
        return torch.arange(int(self.lengths.max())) < self.lengths[:, None]


def make_step(
    seed: int, samples: int = 4, moved: float = 0.25, mismatch: float = 0.0, spread: float = 1.0, equal: int = 0
) -> Step:
    """A random step.

    Args:
        seed: of all that is random.
        samples: responses to a prompt; divides 12, the number of all.
        moved: about how far the policy is from the old one, nats a token; bounded at 15.
        mismatch: the same of the engine and the old policy.
        spread: rewards are this times one of 0, 0.125, 0.75, 1, 2.5, of which a group's sum is exact.
        equal: number of groups whose rewards are equal.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        noise = scale * torch.randn(ROWS, LONGEST, generator=generator, dtype=torch.float64)
        return noise.clamp(-15, 15)

    # Single tokens and the longest are as likely as all other lengths together.
    lengths = torch.randint(1, LONGEST + 1, (ROWS,), generator=generator)
    kind = torch.randint(3, (ROWS,), generator=generator)
    lengths = torch.where(kind == 0, 1, torch.where(kind == 1, LONGEST, lengths))
    truncated = (lengths == LONGEST) & (torch.rand(ROWS, generator=generator) < 0.5)
    scores = torch.tensor([0.0, 0.125, 0.75, 1.0, 2.5], dtype=torch.float64) * spread
    rewards = scores[torch.randint(len(scores), (ROWS,), generator=generator)]
    rewards[: equal * samples] = rewards[:1]
    old = normal(1.0) - 2.0
    policy, reference = old + normal(moved), old + normal(0.3)
    rollout = (old + normal(mismatch)).float().double() if mismatch else old  # TRL takes the engine's as float32
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = [torch.where(inside, one[:, : inside.shape[1]], 0.0) for one in (policy, old, reference, rollout)]
    return Step(lengths, truncated, samples, rewards, *padded)


# --- the cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What TRL runs, and what we run in its place.

    Attributes:
        preset: of ours, under ``like: trl``.
        config: what is set in TRL's configuration.
        axes: what is set in ours besides.
        trainer: which of TRL's.
        on_policy: only where the policy is the old one, as at the first update of a rollout.
        compares_loss: the loss has the same value too, not only the same gradient.
        differs: why the two are not the same; empty where they are.
    """

    preset: str
    config: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    trainer: str = "GRPO"
    on_policy: bool = False
    compares_loss: bool = True
    differs: str = ""

    def algorithm(self, **axes: Any) -> Algorithm:
        return Algorithm(self.preset, like="trl", **{**self.axes, **axes})  # type: ignore[arg-type]

    @property
    def corrects(self) -> bool:
        """Whether TRL corrects for vLLM's log-probs."""
        return self.trainer == "GRPO"


_GRPO, _SEQ_MEAN = {"loss_type": "grpo"}, {"aggregation": "seq_mean_token_mean"}
_DR_GRPO = {"loss_type": "dr_grpo"}
_GSPO = {**_GRPO, "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
_KL = {**_SEQ_MEAN, "kl": "loss_k3_k2", "kl_coefficient": 0.04}
AGREE = {
    "grpo": Case("grpo"),
    "grpo, loss_type=grpo": Case("grpo", _GRPO, _SEQ_MEAN),
    "grpo, beta": Case("grpo", {**_GRPO, "beta": 0.04}, _KL, on_policy=True),
    "dr_grpo": Case("dr_grpo", _DR_GRPO),
    "dr_grpo, scale_rewards": Case("dr_grpo", {**_DR_GRPO, "scale_rewards": "none"}, {"advantage": "group_mean"}),
    "dapo": Case("dapo", {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True}),
    "gspo": Case("gspo", _GSPO),
    "cispo": Case("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),
    "gmpo": Case("gmpo", trainer="GMPO"),
    "rloo": Case("rloo", trainer="RLOO", on_policy=True, compares_loss=False),
}
_MASK, _MASKED = {"mask_truncated_completions": True}, {"mask_truncated": True}
_COUNTED = "a masked response stays in TRL's number of responses, not in ours"
DIFFER = {
    "grpo, masked": Case("grpo", {**_GRPO, **_MASK}, {**_SEQ_MEAN, **_MASKED}, differs=_COUNTED),
    "dr_grpo, masked": Case("dr_grpo", {**_DR_GRPO, **_MASK}, _MASKED, differs=_COUNTED),
    "gspo, masked": Case("gspo", {**_GSPO, **_MASK}, _MASKED, differs=_COUNTED),
    "grpo, beta, off policy": Case(
        "grpo", {**_GRPO, "beta": 0.04}, _KL, differs="off policy TRL's KL is multiplied by the ratio"
    ),
    "rloo, off policy": Case(
        "rloo",
        trainer="RLOO",
        compares_loss=False,
        differs="TRL clips one ratio a response, the product over its tokens; ours is each token's",
    ),
}
CASES = {**AGREE, **DIFFER}
CUTS = ((1, 1), (2, 1), (3, 1), (1, 2), (3, 2))
"""Micro-batches a rank, and ranks."""


def parts_of(cut: tuple[int, int]) -> list[list[int]]:
    """Rows of each micro-batch of each rank."""
    size = ROWS // (cut[0] * cut[1])
    return [list(range(start, start + size)) for start in range(0, ROWS, size)]


class Outcome(NamedTuple):
    """Of one whole optimizer step.

    Attributes:
        loss: of the step.
        gradient: ``[B, T]``, of the loss by the policy's log-probs.
        advantages: ``[B]``, 0 for responses that are not trained on.
        size: what the terms of the policy loss would add up to if none were negative; of ours alone.
    """

    loss: float
    gradient: Tensor
    advantages: Tensor
    size: float = 0.0


# --- theirs ----------------------------------------------------------------------------------------------------------


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def _trainer(name: str, micro_batches: int) -> Any:
    """TRL's trainer for a case, on one process."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
    from trl.rewards import get_soft_overlong_punishment

    case = CASES[name]
    kinds = {"GRPO": (GRPOConfig, GRPOTrainer), "GMPO": (GMPOConfig, GMPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}
    config, trainer = kinds[case.trainer]
    args = config(
        output_dir=_folder().name,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_generations=ROWS,
        max_completion_length=LONGEST,
        per_device_train_batch_size=ROWS // micro_batches,
        gradient_accumulation_steps=micro_batches,
        # Two passes over a rollout: with one, GRPO takes the current log-probs for the old ones.
        num_iterations=2,
        **case.config,
    )
    beta, args.beta = args.beta, 0.0  # a KL makes the trainer load the reference by name
    vocabulary = {"<pad>": 0, "</s>": EOS, "<unk>": INSIDE} | {f"t{i}": FIRST_PROMPT + i for i in range(ROWS)}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Qwen2Config(vocab_size=len(vocabulary), num_key_value_heads=1, pad_token_id=0, eos_token_id=EOS, **sizes)
    overlong = [get_soft_overlong_punishment(LONGEST, LONGEST // 5)] if case.preset == "dapo" else []
    made = trainer(
        model=Qwen2ForCausalLM(model),
        reward_funcs=[_given_reward, *overlong],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["t0"] * ROWS}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
    )
    made.beta, made.ref_model = beta, object()
    return made


def _given_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    raise AssertionError("the rewards are those of the step")


def theirs(name: str, step: Step, cut: tuple[int, int] = (1, 1), vllm: bool = False) -> Outcome:
    """The step by TRL.

    Args:
        name: a key of :data:`CASES`.
        step: the data; unless ``vllm``, TRL does not look at the engine's log-probs.
        cut: micro-batches of a rank, and ranks.
        vllm: as if vLLM had sampled.
    """
    micro_batches, ranks = cut
    trainer = _trainer(name, micro_batches)
    leaf = step.log_probs.clone().requires_grad_()

    def log_probs_of(
        model: Any, ids: Tensor, *_: Any, compute_entropy: bool = False, **__: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        # With gradient it is the loss that asks, else the pass after sampling.
        given = step.reference if model is trainer.ref_model else leaf if torch.is_grad_enabled() else step.old
        given = given[ids[:, 0] - FIRST_PROMPT]
        return given, torch.zeros_like(given) if compute_entropy else None, None

    def generate(_: Any) -> tuple[Any, ...]:
        prompts = [[FIRST_PROMPT + row] for row in range(ROWS)]
        ends = [INSIDE if cut_off else EOS for cut_off in step.truncated.tolist()]
        responses = [[INSIDE] * (length - 1) + [end] for length, end in zip(step.lengths.tolist(), ends)]
        sampled = [row[:length].tolist() for row, length in zip(step.rollout, step.lengths)] if vllm else None
        texts = [""] * ROWS
        if CASES[name].trainer == "RLOO":
            return prompts, responses, texts
        return prompts, responses, None, texts, sampled, {}, None, [[]] * ROWS

    def rewards_of(*asked: Any) -> Tensor:
        further = [torch.tensor(f(completion_ids=asked[-1])).double() for f in trainer.reward_funcs[1:]]
        return torch.stack([step.rewards, *further], dim=1)

    given = {"_generate": generate, "_calculate_rewards": rewards_of, "num_generations": step.samples}
    with mock.patch.multiple(trainer, _get_per_token_logps_and_entropies=log_probs_of, **given):
        trainer.use_vllm = vllm  # the configuration's would start it
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = micro_batches
        made = trainer._generate_and_score_completions([{"prompt": "t0"}] * ROWS)
        total = torch.zeros((), dtype=torch.float64)
        with mock.patch.object(type(trainer.accelerator), "num_processes", ranks):
            for rows in parts_of(cut):
                part = {key: value[rows] if value.dim() else value for key, value in made.items()}
                total = total + trainer._compute_loss(trainer.model, part) / ranks  # DDP's mean
    if not trainer.loss_is_scaled_for_ga:
        total = total / micro_batches
    (gradient,) = torch.autograd.grad(total, leaf)
    trained = made["completion_mask"].any(-1)
    return Outcome(float(total.detach()), gradient, torch.where(trained, made["advantages"], 0.0))


# --- ours ------------------------------------------------------------------------------------------------------------


def batch_of(step: Step) -> Batch:
    """The step as the learner has it before the advantages."""
    return Batch(
        sequences=[torch.zeros(1 + length, dtype=torch.int64) for length in step.lengths.tolist()],
        prompt_lengths=torch.ones(ROWS, dtype=torch.int64),
        response_mask=step.mask,
        group_ids=torch.arange(ROWS) // step.samples,
        rewards=step.rewards.clone(),
        log_probs_rollout=step.rollout,
        truncated=step.truncated,
        log_probs_old=step.old,
        log_probs_reference=step.reference,
    )


def ours(algorithm: Algorithm, step: Step, cut: tuple[int, int] = (1, 1)) -> Outcome:
    """The step by an algorithm of ours. Arguments as in :func:`theirs`."""
    batch, leaf = batch_of(step), step.log_probs.clone().requires_grad_()
    rewards = batch.rewards
    algorithm.shape_rewards(batch, LONGEST, _alone)
    algorithm.filter_groups(batch, rewards)
    algorithm.prepare(batch, _alone)
    mask = batch.response_mask
    totals = StepTotals(int(mask.sum()), int(mask.any(-1).sum()), LONGEST)
    weights = token_weights(mask, algorithm.axes.aggregation, totals) * batch.policy_weights
    size = float((weights * algorithm.objective(step.log_probs, batch).loss).abs().sum())
    total = torch.zeros((), dtype=torch.float64)
    for rows in parts_of(cut):
        total = total + algorithm.loss(leaf[rows], torch.zeros_like(leaf[rows]), batch.select(rows), totals)[0]
    (gradient,) = torch.autograd.grad(total, leaf)
    return Outcome(float(total.detach()), gradient, batch.advantages[:, 0], size)


def _alone(values: Tensor) -> Tensor:
    return values


# --- how far apart ---------------------------------------------------------------------------------------------------


def differences(of_ours: Outcome, of_theirs: Outcome) -> dict[str, float]:
    """Largest relative difference of loss, gradient and advantages.

    Advantages and elements of the gradient are compared with their own size, or a thousandth of the largest where that
    is more; the loss, whose terms may cancel, with the sum of their sizes. Nothing smaller than 1e-6 counts as a size.
    """
    return {
        "loss": abs(of_ours.loss - of_theirs.loss) / max(of_ours.size, abs(of_theirs.loss), 1e-6),
        "gradient": _furthest(of_ours.gradient, of_theirs.gradient),
        "advantages": _furthest(of_ours.advantages, of_theirs.advantages),
    }


def _furthest(one: Tensor, other: Tensor) -> float:
    size = torch.maximum(one.abs(), other.abs())
    return float(((one - other).abs() / size.clamp_min(max(1e-3 * float(size.max()), 1e-6))).max())
