"""The tiny run of tests/trainer as the YAML a user would write."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from trainer import tiny_run


def shortness(item: Any) -> float:
    return tiny_run.shortness(item)


def config(inputs: Path, root: Path) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": str(root),
            "max_iterations": 1,
            "prompts_per_iteration": 4,
            "samples_per_prompt": 4,
            "responses_per_update": 8,
            "callbacks": [
                {
                    "class_path": "Rollout",
                    "init_args": {"engine": {"class_path": "TransformersEngine"}, "sampling": {"max_new_tokens": 5}},
                },
                {"class_path": "WeightSync"},
                {"class_path": "Validation"},
                {"class_path": "RFTCheckpoint", "init_args": {"every_n_iterations": 1}},
            ],
        },
        "model": {
            "actor": {
                "class_path": "ActorModule",
                "init_args": {
                    "config": copy.deepcopy(tiny_run.QWEN2),
                    "tokenizer": str(inputs / "tokenizer"),
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                },
            },
            "algorithm": "grpo",
            "rewards": {"recipes": {"exact_match": [{"reward": reward("small_config.shortness")}]}},
        },
        "data": {"train": {"path": str(inputs / "train.jsonl")}, "val": {"path": str(inputs / "val.jsonl")}},
    }


def reward(function: str) -> dict[str, Any]:
    return {"class_path": "FunctionReward", "init_args": {"function": function}}


def written(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def runs(root: Path) -> list[Path]:
    """Log folders under ``root``, the newest last."""
    return sorted(root.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
