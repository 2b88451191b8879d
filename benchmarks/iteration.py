"""Whole iterations of a run on one GPU, phase by phase, and what the probe of the weight sync takes of them.

    python benchmarks/iteration.py [--shape 1.5b] [--iterations 4] [--device cpu]

GRPO with vLLM in the trainer's process: 64 prompts of 128 tokens, 8 responses each, one token in 256 ends one, 1024 at
most; random weights in Qwen2.5's shapes, float32 with bf16 autocast, gradient checkpointing. One JSON line an
iteration; the first compiles, the last line is the median of the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rollout import SHAPES, make_tokenizer

from lightrft.callback import RFTCallback
from lightrft.callbacks import EngineSleepWake, OffloadDuringRollout, Rollout, Throughput, WeightSync
from lightrft.callbacks import weight_sync as probe
from lightrft.data import PromptData, Source
from lightrft.engines import VLLMEngine
from lightrft.lightning_modules import ActorModule
from lightrft.module import RFTModule
from lightrft.rewards import Component, FunctionReward, Scorer
from lightrft.samples import Sampling
from lightrft.trainer import RFTTrainer

# Of the probe: what takes both sides' fingerprints, and the log-probs of its tokens.
OF_PROBE = {
    "record": (probe, "_record"),
    "read": (probe.Fingerprints, "read"),  # waits for the device: what is left of the push, and the fingerprints
    "engine": (VLLMEngine, "fingerprint"),
    "log_probs": (probe.WeightSync, "_compare_log_probs"),
}


class ProbeSeconds(RFTCallback):
    """Logs an iteration's seconds in parts of the probe."""

    def __init__(self, device: str) -> None:
        self.seconds, self.inside, self.device = dict.fromkeys(OF_PROBE, 0.0), False, device
        for part, (owner, name) in OF_PROBE.items():
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if self.inside:  # another part, which counts it
                return function(*arguments, **options)
            if part == "log_probs":  # it would wait for the engine's cache to wake
                self._wait()
            self.inside, start = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.inside = False
                self.seconds[part] += time.perf_counter() - start

        return timed

    def on_iteration_end(self, trainer: Any, pl_module: Any) -> None:
        for part, seconds in self.seconds.items():
            trainer.log(f"time/probe_{part}_seconds", seconds)
        trainer.log("time/probe_seconds", sum(self.seconds.values()))
        self.seconds = dict.fromkeys(OF_PROBE, 0.0)

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def write_prompts(path: Path, count: int, length: int) -> None:
    rng = random.Random(0)
    lines = [{"input": " ".join(str(rng.randint(2, 99)) for _ in range(length))} for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_trainer(arguments: argparse.Namespace, folder: Path, vocabulary: int) -> RFTTrainer:
    small = arguments.shape == "tiny"
    stops = tuple(random.Random(0).sample(range(min(1000, vocabulary // 2), vocabulary), vocabulary // 256))
    sampling = Sampling(max_new_tokens=16 if small else 1024, stop_token_ids=stops)
    options = {"block_size": 32} if arguments.device == "cpu" else {}
    engine = VLLMEngine(dtype="bfloat16", enforce_eager=small, gpu_memory_utilization=0.3, options=options)
    seconds = ProbeSeconds(arguments.device)
    offload = [OffloadDuringRollout(["optimizer"])] if arguments.device != "cpu" else []
    return RFTTrainer(
        accelerator="cpu" if arguments.device == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed",
        default_root_dir=str(folder),
        max_iterations=arguments.iterations,
        prompts_per_iteration=2 if small else 64,
        samples_per_prompt=8,
        responses_per_update=16 if small else 512,
        tokens_per_microbatch=arguments.tokens,
        callbacks=[Rollout(engine, sampling), WeightSync(), EngineSleepWake(2), *offload, Throughput(), seconds],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768, help="of a micro-batch")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.iterations < 2:
        parser.error("--iterations must be 2 at least: the first is not counted")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = 1024 if arguments.shape == "tiny" else 151936
        make_tokenizer(vocabulary).save_pretrained(folder / "tokenizer")
        write_prompts(folder / "train.jsonl", 64 * arguments.iterations, 8 if arguments.shape == "tiny" else 128)
        config = {
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            **SHAPES[arguments.shape],
        }
        rng = random.Random(0)
        scorer = Scorer({"default": [Component(FunctionReward(lambda item: rng.random()), name="random")]})
        actor = ActorModule(config=config, tokenizer=str(folder / "tokenizer"), gradient_checkpointing=True)
        trainer = make_trainer(arguments, folder, vocabulary)
        trainer.fit(RFTModule(actor, rewards=scorer), PromptData(train=[Source(path=str(folder / "train.jsonl"))]))
        with open(Path(trainer.log_dir, "metrics.csv")) as file:
            rows = [row for row in csv.DictReader(file) if row.get("time/rollout_seconds")]
    report(arguments, rows)


def report(arguments: argparse.Namespace, rows: list[dict[str, str]]) -> None:
    names = [name for name in rows[0] if name.startswith(("time/", "throughput/", "memory/"))]
    found = [{name: round(float(row[name]), 4) for name in names if row[name]} for row in rows]
    for one in found:
        print(json.dumps({"part": "iteration", **one}), flush=True)
    middle = {name: median(one[name] for one in found[1:] if name in one) for name in names}
    phases = ("rollout", "score", "advantages", "update")
    share = middle["time/probe_seconds"] / sum(middle[f"time/{phase}_seconds"] for phase in phases)
    about = {"part": "iteration", "shape": arguments.shape, "median_of": len(found) - 1}
    print(json.dumps({**about, "probe_share": round(share, 5), **middle}), flush=True)


if __name__ == "__main__":
    main()
