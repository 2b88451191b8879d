"""``lightrft plan``: the sizes and the memory of a run of ``fit``, told before there is a device or a process."""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lightrft.analysis.memory import GIB, Decoder, Role, Sampler, generating, phases, pushing
from lightrft.callbacks import EngineSleepWake, OffloadDuringRollout, WeightSync
from lightrft.callbacks.weight_sync import PROBE
from lightrft.cli.fit import RFTCLI
from lightrft.data import PromptData
from lightrft.lightning_modules.backbone import LanguageBackbone
from lightrft.lightning_modules.footprint import (
    GRADIENTS,
    Footprint,
    MicroBatch,
    optimizer_bytes,
    weights_of,
    without_weights,
)
from lightrft.module import RFTModule
from lightrft.ops import split_by_tokens
from lightrft.sequence_cost import SequenceCost
from lightrft.strategies import Layout, Placement, placement_of
from lightrft.trainer import RFTTrainer


class PlanCLI(RFTCLI):
    """Reads what ``fit`` reads, with options of its own, and builds the trainer on one CPU, whatever is asked for.

    Attributes:
        ranks: of the run that is planned.
    """

    def __init__(self, args: ArgsType = None) -> None:
        # A program that is not fit, but is configured as it is: by the same variables of the environment too.
        super().__init__(run=False, save_config_callback=None, args=args, parser_kwargs={"env_prefix": "PL_FIT_"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--device_memory_gib", type=float, help="memory of one device; by default the one here, else 80"
        )
        parser.add_argument(
            "--reserve_gib",
            type=float,
            default=2.0,
            help="of it, what is not for tensors: the CUDA context, NCCL's buffers, gaps between tensors",
        )
        parser.add_argument(
            "--prompt_tokens",
            type=int,
            help="tokens of the longest prompt; by default data.max_prompt_tokens, else 512",
        )
        parser.add_argument("--json", type=bool, default=False, help="print JSON, sizes in bytes")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        given = self._get(self.config_init, "trainer")
        self.ranks = _devices(given["devices"]) * given["num_nodes"]
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "logger": []}
        return super().instantiate_trainer(**kwargs, **here)


@dataclass(frozen=True)
class Sizes:
    """What the configuration comes to.

    Attributes:
        ranks: of the run.
        parallel: ranks that share a sequence.
        rows_per_iteration, rows_per_update: responses of one rank.
        micro_batches: of one update, where all responses are as long as they may be.
        evaluated, largest: what one forward holds at most before the updates, and in one; of this rank's share of each
            sequence.
        prompt_tokens, new_tokens: of the longest.
    """

    ranks: int
    parallel: int
    rows_per_iteration: int
    rows_per_update: int
    micro_batches: int
    evaluated: MicroBatch
    largest: MicroBatch
    prompt_tokens: int
    new_tokens: int

    @classmethod
    def of(cls, trainer: RFTTrainer, ranks: int, prompt_tokens: int, context_tokens: int) -> Sizes:
        """Of a trainer on ``ranks``.

        Raises:
            ValueError: a prompt and a response are longer than the context, or the ranks cannot be grouped.
        """
        new, parallel = trainer.rollout.sampling.max_new_tokens, trainer.sequence_parallel_size
        groups, budget = Layout(ranks, 0, parallel).groups, trainer.tokens_per_microbatch * parallel
        prompt = min(prompt_tokens, context_tokens - new)
        if prompt < 1:
            raise ValueError(
                f"sampling.max_new_tokens {new} leaves no room for a prompt in the model's context of {context_tokens}."
            )
        length, rows = prompt + new, trainer.responses_per_update // groups
        responses = trainer.prompts_per_iteration * trainer.samples_per_prompt
        parts = split_by_tokens([length] * rows, budget)
        evaluated, largest = (_fullest(count, length, new, budget, parallel) for count in (responses // groups, rows))
        return cls(ranks, parallel, responses // ranks, rows, len(parts), evaluated, largest, prompt, new)

    def told(self) -> str:
        """In a sentence."""
        return (
            f"Each rank: {self.rows_per_iteration} responses an iteration, {self.micro_batches} micro-batch(es) an "
            f"update at full length ({self.prompt_tokens} + {self.new_tokens} tokens), {self.largest.tokens} tokens in "
            "the largest" + (f", a sequence on {self.parallel} ranks." if self.parallel > 1 else ".")
        )


def _fullest(rows: int, length: int, new: int, budget: int, parallel: int) -> MicroBatch:
    """As many tokens as a micro-batch may have: responses that end early can fill one better than long ones do."""
    sequences = min(rows, max(1, math.ceil(budget / length)))
    tokens = max(1, min(length, budget // sequences)) if sequences > 1 else length
    return MicroBatch(sequences, math.ceil(tokens / parallel), math.ceil(min(new, max(1, tokens - 1)) / parallel))


class Plan:
    """The memory of a run, phase by phase.

    Args:
        trainer: on one CPU.
        module: not configured.
        ranks: of the run.
        prompt_tokens: of the longest prompt.

    Attributes:
        sizes: what the configuration comes to.
        phases: predicted peaks.
        notes: what is not in them.

    Raises:
        ValueError: the configuration cannot work on so many ranks, or a model's memory cannot be told.
    """

    def __init__(self, trainer: RFTTrainer, module: RFTModule, ranks: int, prompt_tokens: int) -> None:
        self.trainer, self.module, self.notes = trainer, module, list[str]()
        trainer.model = module
        self.heading = trainer.sizes(ranks)
        for model in filter(None, (module.actor, module.critic)):
            _check_kind(model)
            without_weights(model)
        if SequenceCost.of(module.actor.transformer).towers:
            self.notes.append(
                "What sees or hears is in the numbers with its weights alone: activations are the text's."
            )
        self.sizes = Sizes.of(trainer, ranks, prompt_tokens, module.context_tokens)
        self.placements = {role: self._placement(role) for role in self._models()}
        self.phases = phases(
            [self._role(name, model) for name, model in self._models().items()],
            self._sampler(),
            checkpoints=getattr(trainer.checkpoint_callback, "asynchronous", False),
            refills=bool(module.algorithm.refill_rounds),
            away=self._away(),
        )

    @property
    def largest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: self.total(name))

    def total(self, phase: str) -> int:
        """Bytes on the device."""
        return sum(self.phases[phase].device.values())

    def _models(self) -> dict[str, LanguageBackbone]:
        models = {"actor": self.module.actor, "critic": self.module.critic}
        models["reference"] = self.module.actor if self.module.needs_reference_copy else None
        return {role: model for role, model in models.items() if model is not None}

    def _placement(self, role: str) -> Placement:
        strategy = self.trainer.own_strategies.get(role, self.trainer.strategy)
        return placement_of(strategy, self.sizes.ranks, self.trainer.precision)

    def _role(self, name: str, model: LanguageBackbone) -> Role:
        placement, weights, frozen = self.placements[name], weights_of(model), name == "reference"
        at_rest = self._dtype_at_rest
        footprint = self._footprint(name, model, placement)
        role: dict[str, Any] = {"evaluating": footprint.evaluate(self.sizes.evaluated, frozen)}
        if name == "actor" and any(isinstance(one, WeightSync) and one.probe for one in self.trainer.callbacks):
            role["probing"] = footprint.evaluate(MicroBatch(*PROBE))
        if not frozen:
            # One micro-batch begins without gradients; a later one has them all beside it.
            alone = self.sizes.micro_batches == 1 and placement.gradient_shards == 1
            keep = alone and GRADIENTS not in placement.on_host and not placement.casts_at_rest
            stepped = torch.float32 if placement.casts_at_rest else at_rest
            role["training"] = footprint.train(self.sizes.largest, keep)
            role["state_bytes"], role["step_bytes"] = optimizer_bytes(model.optimizer, stepped)
        return Role(
            name=name,
            parameters=weights.all,
            trained=0 if frozen else weights.trained,
            block=weights.block,
            outside=weights.outside,
            weight_bytes=at_rest.itemsize,
            placement=placement,
            **role,
        )

    def _footprint(self, name: str, model: LanguageBackbone, placement: Placement) -> Footprint:
        read = self.trainer.compute_dtype if placement.compute_bytes else self._dtype_at_rest
        mixed = "mixed" in self.trainer.precision and not placement.casts_at_rest
        arguments = {} if name == "critic" else {"temperature": self.trainer.rollout.sampling.temperature}
        return Footprint(model, read, self.trainer.compute_dtype if mixed else None, **arguments)

    @property
    def _dtype_at_rest(self) -> torch.dtype:
        return torch.float32 if "mixed" in self.trainer.precision else self.trainer.compute_dtype

    def _away(self) -> set[str]:
        """Terms of what :class:`OffloadDuringRollout` moves."""
        callbacks = [one for one in self.trainer.callbacks if isinstance(one, OffloadDuringRollout)]
        parts = {part for callback in callbacks for part in callback.parts}
        weights = {f"{part} weights" for part in parts - {"optimizer"}}
        states = {f"{role} {what}" for role in ("actor", "critic") for what in ("optimizer", "master weights")}
        return weights | (states if "optimizer" in parts else set())

    def _sampler(self) -> Sampler:
        engine: Any = getattr(self.trainer.rollout, "engine", None)
        sleeper = next((one for one in self.trainer.callbacks if isinstance(one, EngineSleepWake)), None)
        asleep = cast(Any, sleeper.level if sleeper else None)
        if not hasattr(engine, "sequences_per_batch"):
            self.notes.append(f"What {type(engine).__name__} takes is not in the numbers: it allots its memory itself.")
            return Sampler(asleep=asleep)
        dtype, weights = engine.dtype or self.trainer.compute_dtype, weights_of(self.module.actor)
        adapters = weights.trained if self.module.actor.lora is not None else 0
        # A weight is whole in the trainer's dtype too where it is gathered; where it is merged, so is the change.
        own, gathers = self._dtype_at_rest.itemsize, self.placements["actor"].gathers
        pushed = max(
            pushing(weights.largest, dtype.itemsize + (own if gathers else 0)),
            pushing(weights.adapted, dtype.itemsize + own * (3 + gathers)),
        )
        # Ranks that hold one engine together draw the responses of them all.
        split, sampling = engine.tensor_parallel_size, self.trainer.rollout.sampling
        rows = min(engine.sequences_per_batch, self.sizes.rows_per_iteration * split)
        return Sampler(
            weights=(weights.all - adapters) * dtype.itemsize // split,
            asleep=asleep,
            pushing=pushed,
            generating=generating(
                _decoder(self.module.actor, split),
                rows,
                math.ceil(rows / self.trainer.samples_per_prompt),
                self.sizes.prompt_tokens,
                self.sizes.new_tokens,
                dtype.itemsize,
                sampling.temperature != 1,
            ),
        )

    # --- what it says ------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Sizes, and every phase with its terms in GiB, the largest first."""
        lines = [self.heading, self.sizes.told(), ""]
        lines.append(f"{'GiB on each rank, at most':28s}{'sum':>8s}")
        for name, phase in self.phases.items():
            lines.append(f"{name:28s}{self.total(name) / GIB:8.2f}  {_listed(phase.device)}")
        host = max((phase.host for phase in self.phases.values()), key=lambda terms: sum(terms.values()))
        lines.append(f"{'in host memory':28s}{sum(host.values()) / GIB:8.2f}  {_listed(host)}")
        lines.append("")
        phase = self.phases[self.largest]
        lines.append(
            f"Most is held in {self.largest}, {self.total(self.largest) / GIB:.2f} GiB; its largest term is "
            f"{phase.largest}, {phase.device[phase.largest] / GIB:.2f} GiB."
        )
        return "\n".join(lines + self.notes)

    def remedies(self) -> list[str]:
        """Changes that make the largest term of the largest phase smaller."""
        actor, trainer, phase = self.module.actor, self.trainer, self.phases[self.largest]
        role, _, what = phase.largest.partition(" ")
        model = {"actor": actor, "critic": self.module.critic}.get(role, actor)
        placement = self.placements.get(role, self.placements["actor"])
        if what in ("cache", "while sampling", "of prompts") or phase.largest.endswith("sampling"):
            return ["lower the engine's sequences_per_batch", "lower sampling.max_new_tokens"]
        if role == "engine":
            sleep = (
                [] if any(isinstance(one, EngineSleepWake) for one in trainer.callbacks) else ["list EngineSleepWake"]
            )
            return [*sleep, "set the engine's dtype to bfloat16", *self._sharding(placement)]
        if what in ("activations", "logits"):
            first = [] if model.gradient_checkpointing or what == "logits" else ["set gradient_checkpointing: true"]
            smaller = f"lower trainer.tokens_per_microbatch (now {trainer.tokens_per_microbatch})"
            long = self.sizes.prompt_tokens + self.sizes.new_tokens
            if trainer.tokens_per_microbatch * self.sizes.parallel <= long:
                smaller = "raise trainer.sequence_parallel_size, for one sequence alone fills a micro-batch"
            replicated = placement.optimizer_shards == 1
            return [*first, smaller, *(self._sharding(placement) if replicated else [])]
        lora = [] if model.lora is not None else [f"set lora on the {role if role == 'critic' else 'actor'}"]
        return [*self._sharding(placement), *lora]

    def _sharding(self, placement: Placement) -> list[str]:
        if placement.optimizer_shards == 1 and self.sizes.ranks > 1:
            return ["set trainer.strategy to fsdp2"]
        return ["use more GPUs with fsdp2", *([] if placement.on_host else ["set trainer.strategy to fsdp2_offload"])]

    def as_json(self) -> str:
        """Bytes by phase and term."""
        found = {name: {"device": phase.device, "host": phase.host} for name, phase in self.phases.items()}
        return json.dumps({"ranks": self.sizes.ranks, "largest": self.largest, "phases": found}, indent=1)


def _listed(terms: dict[str, int]) -> str:
    shown = sorted((name for name in terms if terms[name] >= 0.005 * GIB), key=lambda name: -terms[name])
    return ", ".join(f"{name} {terms[name] / GIB:.2f}" for name in shown)


def _decoder(actor: LanguageBackbone, split: int) -> Decoder:
    """One of ``split`` ranks' part, but for the vocabulary: the distributions that tokens are drawn from are whole."""
    config = actor.transformer.config.get_text_config()
    heads = config.num_attention_heads
    return Decoder(
        layers=config.num_hidden_layers,
        heads=heads // split,
        kv_heads=(getattr(config, "num_key_value_heads", None) or heads) // split,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        intermediate=(getattr(config, "intermediate_size", None) or 4 * config.hidden_size) // split,
        vocabulary=actor.transformer.get_input_embeddings().num_embeddings,
    )


def _check_kind(model: Any) -> None:
    if not isinstance(model, LanguageBackbone):
        raise ValueError(
            f"The memory of {type(model).__name__} cannot be planned; that of ActorModule, CriticModule and their "
            "subclasses can."
        )


def _devices(devices: int | str | list[int]) -> int:
    """How many are asked for on each node; ``auto`` and -1 are those here, at least one."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([one for one in devices.split(",") if one.strip()])
    count = -1 if devices == "auto" else int(devices)
    return count if count >= 0 else max(1, torch.accelerator.device_count())


def _device_memory(given: float | None) -> float:
    """GiB."""
    if given is not None:
        return given
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 80.0


def main(args: ArgsType = None) -> None:
    """Print the plan. ``args`` are those after ``plan``.

    Raises:
        SystemExit: with status 1 and the reason where the run does not fit, or cannot work.
    """
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    cli = PlanCLI(args)
    settings = cli.config
    memory, reserve = _device_memory(settings["device_memory_gib"]), settings["reserve_gib"]
    prompt_tokens = settings["prompt_tokens"]
    if prompt_tokens is None:
        prompt_tokens = cast(PromptData, cli.datamodule).max_prompt_tokens or 512
    if prompt_tokens < 1 or not 0 <= reserve < memory:
        sys.exit("--prompt_tokens must be at least 1, and --reserve_gib from 0 to below --device_memory_gib.")
    plan = Plan(cast(RFTTrainer, cli.trainer), cast(RFTModule, cli.model), cli.ranks, prompt_tokens)
    print(plan.as_json() if settings["json"] else plan.report())
    needed = plan.total(plan.largest) / GIB
    if needed > memory - reserve:
        sys.exit(
            f"This does not fit: {plan.largest} needs {needed:.2f} GiB on each rank, and a device of {memory:.1f} GiB "
            f"has {memory - reserve:.1f} for tensors. {plan.phases[plan.largest].largest} is the largest term; "
            f"{'; or '.join(plan.remedies())}."
        )
    if not settings["json"]:
        print(f"It fits: a device of {memory:.1f} GiB has {memory - reserve:.1f} for tensors.")
