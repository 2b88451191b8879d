"""What the probe of a weight sync costs: fingerprints of a whole model, once in the trainer and once in the engine.

    python benchmarks/probe.py            # the GPU, if there is one: bfloat16 weights in Qwen2.5's shapes
    python benchmarks/probe.py --blocks 1 # one block of each instead of all

Adds lines for the device to ``benchmarks/results/probe.jsonl``: milliseconds of one side (median of 5), seconds for
each GB, whether the kernel or torch summed, and the largest memory beside the weights. The goal of 1 % is of the
iteration, both sides together.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightrft.ops import Fingerprint, Fingerprints
from lightrft.ops.fingerprint import kernel_on

RESULTS = Path(__file__).parent / "results" / "probe.jsonl"
# Layers, hidden size, size of the MLP, heads, key and value heads, vocabulary.
MODELS = {"0.5B": (24, 896, 4864, 14, 2, 151936), "1.5B": (28, 1536, 8960, 12, 2, 151936)}
REPEATS = 5


def model_of(name: str, blocks: int | None, device: torch.device) -> Any:
    layers, hidden, width, heads, key_value_heads, vocabulary = MODELS[name]
    config = AutoConfig.for_model(
        "qwen2",
        num_hidden_layers=blocks or layers,
        hidden_size=hidden,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def fingerprints(model: Any) -> dict[str, Fingerprint]:
    prints = Fingerprints()
    for name, parameter in model.named_parameters():
        prints.add(name, parameter)
    return prints.read()


def measured(name: str, blocks: int | None, device: torch.device) -> dict[str, Any]:
    model = model_of(name, blocks, device)
    size = sum(parameter.nbytes for parameter in model.parameters())
    fingerprints(model)  # tables and kernels
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        fingerprints(model)  # reading them waits for the device
        times.append(time.perf_counter() - start)
    found = {
        "model": name,
        "blocks": model.config.num_hidden_layers,
        "sums": "kernel" if kernel_on(next(model.parameters()).device) else "torch",
        "tensors": len(list(model.parameters())),
        "gigabytes": round(size / 1e9, 3),
        "milliseconds": round(1000 * median(times), 2),
        "seconds_a_gigabyte": round(median(times) / (size / 1e9), 5),
    }
    if device.type == "cuda":
        found["extra_megabytes"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int)
    blocks = parser.parse_args().blocks
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    lines = [{"device": name, "torch": torch.__version__, **measured(model, blocks, device)} for model in MODELS]
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    print(*map(json.dumps, lines), sep="\n")


if __name__ == "__main__":
    main()
