"""Gradients of one GRPO step for many ways of cutting it; run on one rank, or by torchrun on several.

python gradient_cases.py INPUTS OUT.pt
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.fabric import Fabric
from trainer import tiny_run

from lightrft.algorithms import Algorithm
from lightrft.learner import Learner
from lightrft.lightning_modules import ActorModule
from lightrft.module import RFTModule
from lightrft.samples import Batch, Prompt, Response, Rollout, Sampling

TEMPERATURE, LONGEST = 0.8, 9
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm")
# Of 110 trained tokens and their prompts: one micro-batch, two, four or more, and one a response.
BUDGETS = {"1 micro-batch": 10_000, "2 micro-batches": 90, "4 micro-batches": 48, "uneven": 23}


class Recorder(torch.optim.SGD):
    """Keeps the gradient that a step would apply."""

    gradient: torch.Tensor

    def step(self, closure: Any = None) -> None:
        self.gradient = torch.cat([p.grad.flatten().double() for group in self.param_groups for p in group["params"]])


def rollout(keep: int = 16) -> Rollout:
    """Eight prompts of two responses, of 0 to 9 tokens; one response is dropped. The same on every rank.

    Args:
        keep: responses after this many are dropped too.
    """
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(2, 14, (count,), generator=generator)

    lengths = iter([9, 1, 3, 0, 7, 7, 2, 9, 5, 4, 8, 1, 6, 9, 2, 3])
    prompts = [Prompt(str(i), tokens(2 + i % 3), "") for i in range(8)]

    def response() -> Response:
        length = next(lengths)
        return Response(tokens(length), torch.full((length,), -2.5), "", "stop")

    groups = [[response(), response()] for _ in prompts]
    for index, scored in enumerate(one for group in groups for one in group):
        scored.reward, scored.dropped = float(index % 5), index == 7 or index >= keep
    return Rollout(prompts, groups, Sampling())


def share(batch: Batch, fabric: Fabric) -> Batch:
    rows = len(batch) // fabric.world_size
    return batch.select(range(fabric.global_rank * rows, (fabric.global_rank + 1) * rows))


def gradient(
    fabric: Fabric, inputs: Path, budget: int, packing: bool, aggregation: Any, keep: int = 16
) -> torch.Tensor:
    """The step's gradient, flattened, float64."""
    fabric.seed_everything(0, verbose=False)
    actor = ActorModule(
        config=tiny_run.QWEN2,
        tokenizer=str(inputs / "tokenizer"),
        packing=packing,
        optimizer=lambda p: Recorder(p, lr=1.0),
    )
    module = RFTModule(actor, Algorithm(aggregation=aggregation, kl_coefficient=0.1))
    with fabric.init_module():
        module.configure_model()
    learner = Learner(fabric, module, budget, gradient_clip_val=None)
    batch = share(Batch.from_rollout(rollout(keep)), fabric)
    learner.prepare(batch, TEMPERATURE)
    # Off policy, away from the reference, and near no kink of the clip: where each term has a gradient.
    batch.log_probs_old = batch.log_probs_old + 0.05 * batch.response_mask
    batch.log_probs_reference = batch.log_probs_reference - 0.3 * batch.response_mask
    learner.update(batch, TEMPERATURE, LONGEST)
    return learner.optimizer.optimizer.gradient


def local_means() -> Any:
    """The field's bug: each micro-batch and rank divides by its own counts."""
    from lightrft.algorithms import StepTotals, algorithm
    from lightrft.algorithms.aggregation import token_weights

    def wrong(mask: torch.Tensor, aggregation: Any, totals: StepTotals) -> torch.Tensor:
        own = StepTotals(int(mask.sum()), int(mask.any(-1).sum()), totals.max_response_tokens)
        return token_weights(mask, aggregation, own)

    return mock.patch.object(algorithm, "token_weights", wrong)


def main() -> None:
    inputs, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    gradients: dict[tuple[str, ...], torch.Tensor] = {}
    for precision in ("32-true", "64-true"):
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        strategy = "ddp" if ranks > 1 else "auto"
        fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy, precision=precision)
        fabric.launch()
        for (name, budget), packing, aggregation in itertools.product(BUDGETS.items(), (True, False), AGGREGATIONS):
            key = (precision, name, "packed" if packing else "padded", aggregation)
            gradients[key] = gradient(fabric, inputs, budget, packing, aggregation)
        for name, aggregation in itertools.product(("1 micro-batch", "4 micro-batches"), AGGREGATIONS):
            # Of two ranks the second has nothing to train on, and must still keep step with the first.
            key = (precision, f"half dropped, {name}", "packed", aggregation)
            gradients[key] = gradient(fabric, inputs, BUDGETS[name], True, aggregation, keep=8)
        with local_means():
            for aggregation in AGGREGATIONS:
                key = (precision, "local means", "packed", aggregation)
                gradients[key] = gradient(fabric, inputs, BUDGETS["4 micro-batches"], True, aggregation)
    if fabric.is_global_zero:
        torch.save(gradients, out)
    if fabric.world_size > 1:
        fabric.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
