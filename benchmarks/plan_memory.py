"""Predicted against measured memory of each phase: real runs of RFTTrainer on one GPU beside their plans.

    python benchmarks/plan_memory.py            # one GPU; fresh weights of Qwen2.5's shapes, no network
    python benchmarks/plan_memory.py --tiny     # on a CPU, to see that it runs; it measures the process there
    python benchmarks/plan_memory.py --table    # the table of docs/plan.md from the results

Writes ``$OUT/plan_memory.json``, or ``benchmarks/results/plan_memory.json`` where ``OUT`` is not set.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightrft.callbacks import EngineSleepWake, Rollout, Throughput, WeightSync
from lightrft.cli.plan import Plan
from lightrft.data import PromptData, Source
from lightrft.engines import TransformersEngine
from lightrft.lightning_modules import ActorModule, CriticModule
from lightrft.lightning_modules.pretrained import LoRA
from lightrft.module import RFTModule
from lightrft.rewards import Component, FunctionReward, RewardInput, Scorer
from lightrft.samples import Sampling
from lightrft.trainer import RFTTrainer

GIB = 2**30
PHASES = ("rollout", "score", "advantages", "update")
RESULTS = Path(__file__).parent / "results" / "plan_memory.json"
CHARACTERS = ["<pad>", "<|endoftext|>", *"abcdefgh"]

QWEN = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}
HALF = QWEN | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864}
HALF |= {"num_key_value_heads": 2}
ONE_AND_A_HALF = QWEN | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12}
ONE_AND_A_HALF |= {"num_key_value_heads": 2, "intermediate_size": 8960}
TINY = QWEN | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TINY |= {"num_key_value_heads": 2, "vocab_size": 4096}

# Name, shape, precision, options of the actor, algorithm, updates an iteration.
Case = tuple[str, dict[str, Any], str, dict[str, Any], str, int]
CASES: list[Case] = [
    ("0.5B bf16-mixed", HALF, "bf16-mixed", {}, "grpo", 1),
    ("0.5B bf16-mixed, checkpointing", HALF, "bf16-mixed", {"gradient_checkpointing": True}, "grpo", 1),
    ("0.5B bf16-mixed, 4 updates", HALF, "bf16-mixed", {"gradient_checkpointing": True}, "grpo", 4),
    ("0.5B 32-true, checkpointing", HALF, "32-true", {"gradient_checkpointing": True}, "grpo", 1),
    ("0.5B bf16-mixed, LoRA", HALF, "bf16-mixed", {"lora": LoRA(16)}, "grpo", 1),
    ("0.5B bf16-mixed, critic", HALF, "bf16-mixed", {"gradient_checkpointing": True}, "ppo", 1),
    ("1.5B bf16-mixed, checkpointing", ONE_AND_A_HALF, "bf16-mixed", {"gradient_checkpointing": True}, "grpo", 1),
]


def write_inputs(folder: Path, prompt_tokens: int) -> None:
    """A tokenizer of single letters, and prompts of which every fourth is half as long: batches are padded."""
    vocabulary = {token: index for index, token in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=CHARACTERS[1], pad_token=CHARACTERS[0])
    fast.save_pretrained(folder / "tokenizer")
    lengths = [prompt_tokens if row % 4 else prompt_tokens // 2 for row in range(64)]
    prompts = [{"input": ("abcdefgh" * length)[row % 8 :][:length]} for row, length in enumerate(lengths)]
    (folder / "train.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def reward(item: RewardInput) -> float:
    """Differs within a group."""
    return float(sum(map(ord, item.response)) % 7)


def module_of(folder: Path, case: Case) -> RFTModule:
    _, shape, _, options, algorithm, _ = case
    actor = ActorModule(config=dict(shape), tokenizer=str(folder / "tokenizer"), **options)
    plain = {name: value for name, value in options.items() if name != "lora"}
    critic = CriticModule(config=dict(shape), **plain) if algorithm == "ppo" else None
    return RFTModule(actor, algorithm, Scorer({"default": [Component(FunctionReward(reward), name="sum")]}), critic)


def trainer_of(folder: Path, case: Case, new_tokens: int, **options: Any) -> RFTTrainer:
    """Two iterations: the second one's peaks include optimizer states throughout."""
    callbacks = [Rollout(TransformersEngine(), Sampling(max_new_tokens=new_tokens)), WeightSync(), EngineSleepWake()]
    return RFTTrainer(
        devices=1,
        precision=case[2],
        callbacks=[*callbacks, Throughput()],
        logger=[],
        default_root_dir=str(folder / "runs"),
        max_iterations=2,
        prompts_per_iteration=8,
        samples_per_prompt=8,
        responses_per_update=64 // case[5],
        **options,
    )


def run(folder: Path, case: Case, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    sizes = {"tokens_per_microbatch": 32 * (prompt_tokens + new_tokens)}
    planning = time.perf_counter()
    plan = Plan(
        trainer_of(folder, case, new_tokens, accelerator="cpu", **sizes), module_of(folder, case), 1, prompt_tokens
    )
    planning = time.perf_counter() - planning
    predicted = {name: plan.total(name) / GIB for name in plan.phases}
    predicted["update"] = max(size for name, size in predicted.items() if name.startswith("update"))
    started = time.perf_counter()
    trainer = trainer_of(folder, case, new_tokens, **sizes)
    trainer.fit(module_of(folder, case), PromptData(train=[Source(path=str(folder / "train.jsonl"))]))
    measured = {phase: trainer.callback_metrics[f"memory/{phase}_peak_gib"] for phase in PHASES}
    row = {
        "case": case[0],
        "predicted_gib": {phase: predicted[phase] for phase in PHASES},
        "measured_gib": measured,
        "terms_gib": {
            name: {term: size / GIB for term, size in phase.device.items() if size}
            for name, phase in plan.phases.items()
        },
        "outside_gib": outside(),
        "planning_seconds": planning,
        "run_seconds": time.perf_counter() - started,
    }
    for phase in PHASES:
        told = f"{predicted[phase] / measured[phase] - 1:+8.1%}" if torch.cuda.is_available() else "  (the process)"
        print(f"{case[0]:34s}{phase:12s}{predicted[phase]:8.2f}{measured[phase]:8.2f}{told}", flush=True)
    return row


def outside() -> dict[str, float]:
    """What the device holds beyond torch's tensors: its context, and what the allocator keeps in gaps."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    reserved, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
    return {"context": (total - free - reserved) / GIB, "reserved_at_peak_of_last_phase": peak / GIB}


def table(results: dict[str, Any]) -> str:
    """Markdown: predicted / measured GiB and the difference, a row for each case."""
    lines = ["| case | " + " | ".join(PHASES) + " |", "|---" * (len(PHASES) + 1) + "|"]
    for row in results["cases"]:
        cells = []
        for phase in PHASES:
            predicted, measured = row["predicted_gib"][phase], row["measured_gib"][phase]
            cells.append(f"{predicted:.2f} / {measured:.2f} ({predicted / measured - 1:+.0%})")
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def quietly(work: Callable[[], Any]) -> Any:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    return work()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes and few tokens")
    parser.add_argument("--table", action="store_true", help="print the table of what is in benchmarks/results")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    if not torch.cuda.is_available() and not options.tiny:
        sys.exit("This measures a GPU, and there is none; --tiny shows that it runs.")
    cases = [case for case in CASES if options.only in case[0]]
    if options.tiny:
        cases = [(name, TINY, *rest) for name, _, *rest in cases]  # type: ignore[misc]
    prompt_tokens, new_tokens = (16, 8) if options.tiny else (128, 128)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (the process, not its tensors)"
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    results: dict[str, Any] = {"device": device, **versions, "cases": []}
    target = Path(os.environ["OUT"]) / RESULTS.name if "OUT" in os.environ else RESULTS
    print(f"{'case':34s}{'phase':12s}{'plan':>8s}{'run':>8s}   GiB")
    with tempfile.TemporaryDirectory() as root:
        write_inputs(Path(root), prompt_tokens)
        for case in cases:
            results["cases"].append(run(Path(root), case, prompt_tokens, new_tokens))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if not options.tiny:  # after every case: what is measured is not lost with a later one
                target.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    quietly(main)
