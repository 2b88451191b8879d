"""Gradients of one supervised step under Lightning's Trainer for many ways of cutting it; on one rank or more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from trainer import tiny_run

from lightrft.data import SupervisedData, SupervisedSource
from lightrft.lightning_modules import ActorModule

# Of eight sequences with 90 tokens: whole, in two, in four or more, and one a sequence.
BUDGETS = {"1 micro-batch": 10_000, "2 micro-batches": 50, "4 micro-batches": 30, "uneven": 13}
PRECISIONS = ("32-true", "64-true")


class Recorder(torch.optim.SGD):
    """Keeps the gradient that a step would apply."""

    gradient: torch.Tensor

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.gradient = torch.cat([p.grad.flatten().double() for group in self.param_groups for p in group["params"]])
        return loss


def gradient(inputs: Path, ranks: int, budget: int, precision: Any, **options: Any) -> torch.Tensor:
    """The gradient of a step over all lessons, flattened, float64."""
    pl.seed_everything(0, verbose=False)
    actor = ActorModule(
        config=tiny_run.QWEN2, tokenizer=str(inputs / "tokenizer"), optimizer=lambda params: Recorder(params, lr=1.0)
    )
    data = SupervisedData(
        train=SupervisedSource(path=str(inputs / "lessons.jsonl")),
        batch_size=8 // ranks,
        tokens_per_microbatch=budget,
        chat_template=False,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision=precision,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(actor, data)
    return trainer.optimizers[0].gradient


def gradients(inputs: Path, ranks: int) -> dict[tuple[str, str], torch.Tensor]:
    """By (precision, cut)."""
    found = {
        (precision, name): gradient(inputs, ranks, budget, precision)
        for precision in PRECISIONS
        for name, budget in BUDGETS.items()
    }
    found["clipped", "uneven"] = gradient(inputs, ranks, BUDGETS["uneven"], "64-true", gradient_clip_val=0.01)
    return found
