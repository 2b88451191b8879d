"""A whole run, small enough for tests: a two-layer Qwen2 on one-digit sums, in a folder of its own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PreTrainedTokenizerFast

from lightrft.algorithms import Algorithm
from lightrft.callback import RFTCallback
from lightrft.callbacks import (
    AheadRollout,
    EngineSleepWake,
    KLController,
    PartialRollout,
    RFTCheckpoint,
    Rollout,
    Throughput,
    TrajectoryWriter,
    Validation,
    WeightSync,
)
from lightrft.data import PromptData, Source
from lightrft.engines import Engine, TransformersEngine
from lightrft.lightning_modules import ActorModule, CriticModule
from lightrft.module import RFTModule
from lightrft.rewards import Component, FunctionReward, RewardInput, Scorer
from lightrft.samples import Sampling
from lightrft.strategies import gathered, state, whole
from lightrft.trainer import RFTTrainer

# An exported folder, its model a Qwen2, is read with Qwen2's tokenizer class, which wants a token of this name.
END = "<|endoftext|>"
CHARACTERS = ["<pad>", END, *"0123456789+="]
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": len(CHARACTERS),
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TIMINGS = ("time/", "throughput/", "memory/")


def write_inputs(folder: Path) -> Path:
    """A tokenizer and sums: ``tokenizer/``, ``train.jsonl``, ``val.jsonl``."""
    vocabulary = {token: index for index, token in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>")
    fast.save_pretrained(folder / "tokenizer")
    sums = [{"input": f"{a}+{b}=", "reference": str(a + b), "label": "exact_match"} for a in range(6) for b in range(6)]
    for name, part in {"train": sums[:30], "val": sums[30:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    return folder


def actor(folder: Path, lr: float = 1e-2, **options: Any) -> ActorModule:
    settings: dict[str, Any] = {
        "config": QWEN2,
        "tokenizer": str(folder / "tokenizer"),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=lr, eps=1e-6),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
    }
    return ActorModule(**settings | options)


def module(folder: Path, algorithm: Algorithm | None = None, scorer: Scorer | None = None, **options: Any) -> RFTModule:
    # Rewards that differ within groups from the first step on: an untrained model is never right.
    algorithm = algorithm or Algorithm(kl_coefficient=0.05)
    critic = None
    if algorithm.needs_values:
        critic = CriticModule(config=QWEN2, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, eps=1e-6))
    return RFTModule(actor(folder, **options), algorithm, scorer or scoring(shortness), critic)


def scoring(reward: Callable[[RewardInput], float | None], **policy: Any) -> Scorer:
    return Scorer({"exact_match": [Component(FunctionReward(reward), name="shortness")]}, **policy)


def shortness(item: RewardInput) -> float:
    """Fewer digits score higher; some responses of an untrained model do."""
    return 1.0 / (1 + len(item.response)) + (item.response[:1] == (item.reference or "")[:1])


def shortness_of_odd_sums(item: RewardInput) -> float:
    """The responses to half of the prompts all score alike."""
    return shortness(item) if int(item.reference or 0) % 2 else 0.0


def data(folder: Path) -> PromptData:
    return PromptData(train=[Source(path=str(folder / "train.jsonl"))], val=[Source(path=str(folder / "val.jsonl"))])


def sampler(engine: Engine | None = None, **sampling: Any) -> Rollout:
    return Rollout(engine or TransformersEngine(), Sampling(**{"max_new_tokens": 5, **sampling}))


class BesideTraining(TransformersEngine):
    """Of this process, but it can sample in a thread while the trainer computes: it shares nothing with it."""

    in_own_process = True


def ahead(engine: Engine | None = None, **sampling: Any) -> AheadRollout:
    return AheadRollout(engine or BesideTraining(), Sampling(**{"max_new_tokens": 5, **sampling}))


def partial(engine: Engine | None = None, segment_tokens: int = 2, groups: int = 4, **sampling: Any) -> PartialRollout:
    """Every third token or so ends a response, so that lengths differ."""
    chosen = Sampling(**{"max_new_tokens": 8, "stop_token_ids": (2, 3, 4, 5), **sampling})
    return PartialRollout(engine or TransformersEngine(), chosen, segment_tokens, groups)


def trainer(
    root: Path,
    callbacks: Sequence[RFTCallback] = (),
    usual: Sequence[RFTCallback] | None = None,
    model: RFTModule | None = None,
    **options: Any,
) -> RFTTrainer:
    """Three iterations of two updates; further callbacks come after the usual ones, which fit ``model``."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(root),
        "max_iterations": 3,
        "prompts_per_iteration": 4,
        "samples_per_prompt": 4,
        "responses_per_update": 8,
        "tokens_per_microbatch": 40,
        "timeout_seconds": 200.0,  # less than a test has, so that who hangs is named, with its stack
        **options,
    }
    if usual is None:
        usual = [
            sampler(),
            WeightSync(),
            EngineSleepWake(),
            Throughput(),
            *([KLController(target=0.05, horizon=200)] if model is None or model.algorithm.needs_reference else []),
            Validation(every_n_iterations=2),
            TrajectoryWriter(token_ids=True),
        ]
    return RFTTrainer(callbacks=[*usual, *callbacks], **settings)


def fit(
    inputs: Path,
    root: Path,
    callbacks: Sequence[RFTCallback] = (),
    usual: Sequence[RFTCallback] | None = None,
    model: RFTModule | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> RFTTrainer:
    """A whole run; ``options`` are the trainer's."""
    run = trainer(root, callbacks, usual, model, **options)
    run.fit(model or module(inputs), data(inputs), ckpt_path)
    return run


def weights(run: RFTTrainer) -> dict[str, torch.Tensor]:
    """The policy's, as a copy."""
    return {name: tensor.detach().clone() for name, tensor in run.model.export_parameters()}


def whole_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of any module under any strategy, as copies; every rank asks."""
    found = {}
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            found[name] = whole(parameter).clone()
    return found


def write_lessons(folder: Path) -> None:
    """``lessons.jsonl``: lengths so unlike that ranks have different numbers of micro-batches."""
    lessons = [{"prompt": "1" * (1 + i % 3) + "=", "response": "23456789012345"[: 1 + (5 * i) % 13]} for i in range(8)]
    (folder / "lessons.jsonl").write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons))


def write_media_lessons(folder: Path, family: str, counts: tuple[int, ...] = (1, 1, 2, 1, 1, 0, 1, 0)) -> None:
    """A model that sees or hears in ``model``, and ``lessons.jsonl``, each with so many images or sounds."""
    from media_worlds import media_world

    world = media_world(family)
    world.model.save_pretrained(folder / "model")
    world.processor.save_pretrained(folder / "model")
    placeholder, lessons = f"<{world.kind[:-1]}>", []
    for i, count in enumerate(counts):
        files = [folder / f"{i}-{index}" for index in range(count)]
        for index, file in enumerate(files):
            file.write_bytes(world.reference(i + index))
        prompt = "".join(f"[{i}]{placeholder}" for _ in files) + f"[{i + 1}]"
        response = "".join(f"[{2 * i + step}]" for step in range(1 + i % 4))
        lessons.append({"prompt": prompt, "response": response, world.kind: [file.name for file in files]})
    (folder / "lessons.jsonl").write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons))


def checkpoints(**options: Any) -> RFTCheckpoint:
    return RFTCheckpoint(**{"every_n_iterations": 1, **options})


def saved_state(folder: Path) -> dict[str, Any]:
    """All that a checkpoint's model folder holds, by name."""
    held = state.contents(folder)
    tensors = {name for name, one in held.items() if isinstance(one, TensorStorageMetadata)}
    return state.read(folder, {name: state.empty_like(held[name]) if name in tensors else None for name in held})


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's model weights by name."""
    return {name: value for name, value in saved_state(folder).items() if name.startswith(state.MODEL)}


def rows(log_dir: str | Path) -> dict[int, dict[str, str]]:
    """``metrics.csv`` by step, timings left out, empty cells too."""
    with (Path(log_dir) / "metrics.csv").open() as file:
        return {
            int(row["step"]): {k: v for k, v in row.items() if v != "" and not k.startswith(TIMINGS)}
            for row in csv.DictReader(file)
        }


def trajectories(log_dir: str | Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((Path(log_dir) / "trajectories").iterdir())}


def responses(log_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of all ranks by step, sorted; log-probs left out, which differ by rounding."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((log_dir / "trajectories").iterdir()):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line.pop("log_probs")
        found.setdefault(path.name.rsplit("-", 1)[0], []).extend(lines)
    return {step: sorted(lines, key=json.dumps) for step, lines in found.items()}


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts, lists and tuples by path."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)  # type: ignore[assignment]
    else:
        return {prefix: state}
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}


def differences(left: Any, right: Any) -> list[str]:
    """Paths at which two states differ by any bit."""
    a, b = flat(left), flat(right)

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else bool(x == y)

    return sorted(a.keys() ^ b.keys()) + [path for path in a.keys() & b.keys() if not same(a[path], b[path])]
