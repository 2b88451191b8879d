"""Whole tiny runs on the GPUs of one machine under every strategy and precision, against one GPU in float32.

    python benchmarks/gpu_strategies.py FOLDER                                       # one GPU: what is compared with
    torchrun --nproc_per_node 2 benchmarks/gpu_strategies.py FOLDER

Appends a line of JSON for each run to ``FOLDER/gpu_strategies.jsonl``: the largest difference of any weight after three
iterations (``gap``), the last iteration's reward and gradient norm, and the engine's mismatch in nats.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies import Strategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from trainer import tiny_run
from trainer.distributed_cases import ALGORITHMS

from lightrft.strategies import FSDP2, STRATEGIES, ZeRO

SIZE, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def main() -> None:
    torch.set_float32_matmul_precision("highest")
    folder = Path(sys.argv[1])
    if SIZE == 1:
        tiny_run.write_inputs(folder)
        for algorithm in ALGORITHMS:
            measure(folder, "auto", "auto", algorithm)
        return
    for algorithm in ALGORITHMS:
        for name in ("ddp", "fsdp2", "fsdp2_offload", "zero1", "zero2", "zero3"):
            measure(folder, name, STRATEGIES[name](), algorithm)
    measure(folder, "hsdp", FSDP2(replicas=2))
    measure(folder, "zero3, hpz", ZeRO(stage=3, hpz=2))
    for name in ("ddp", "fsdp2", "zero2", "zero3"):
        measure(folder, name, STRATEGIES[name](), sequence_parallel_size=2)
        for precision in ("bf16-mixed", "16-mixed"):
            measure(folder, name, STRATEGIES[name](), precision=precision)
    for name in ("zero2_offload", "zero3_offload"):
        for precision in ("32-true", "bf16-mixed"):
            measure(folder, name, STRATEGIES[name](), optimizer=_cpu_adam, precision=precision)


def measure(
    folder: Path, name: str, strategy: str | Strategy, algorithm: str = "grpo", optimizer: Any = None, **options: Any
) -> None:
    began = time.perf_counter()
    model = tiny_run.module(folder, ALGORITHMS[algorithm](), **({"optimizer": optimizer} if optimizer else {}))
    sizes = {"prompts_per_iteration": 8, "responses_per_update": 16}
    trainer = tiny_run.fit(
        folder, folder / "runs", model=model, accelerator="cuda", devices=SIZE, strategy=strategy, **sizes, **options
    )
    weights = {key: weight.float().cpu() for key, weight in model.export_parameters()}
    alone = folder / f"alone-{algorithm}.pt"
    if SIZE == 1:
        torch.save(weights, alone)
    gap = max(float((weights[key] - weight).abs().max()) for key, weight in torch.load(alone).items())
    metrics = trainer.callback_metrics
    row = {"strategy": name, "optimizer": "DeepSpeedCPUAdam" if optimizer else "AdamW", "algorithm": algorithm}
    row |= {"ranks": SIZE, "precision": "32-true"} | options | {"gap": gap}
    row |= {key: metrics[key] for key in ("reward/mean", "gradient_norm", "weight_sync/mismatch_nats")}
    if RANK == 0:
        with (folder / "gpu_strategies.jsonl").open("a") as file:
            file.write(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}) + "\n")


def _cpu_adam(parameters: Any) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, lr=1e-2, eps=1e-6, weight_decay=1e-2)


if __name__ == "__main__":
    main()
