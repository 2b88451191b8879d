"""Ranks with other media, or none, end as one process with all rows does, under every strategy."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from media_worlds import MediaWorld, media_world
from ranks import on_ranks
from torch import Tensor

from lightrft.algorithms import Algorithm
from lightrft.learner import Learner
from lightrft.lightning_modules import ActorModule
from lightrft.module import RFTModule
from lightrft.samples import Batch, Prompt, Response, Rollout, Sampling
from lightrft.strategies import Roles, make_fabric

FAMILIES = ["qwen2_audio", *(["qwen2_5_vl"] if find_spec("torchvision") else [])]
STRATEGIES = ["ddp", "fsdp2", "zero2", "zero3"]
# Some weights of LLaVA's tower never get a gradient.
CASES = [("llava", "ddp"), *((family, strategy) for family in FAMILIES for strategy in STRATEGIES)]
UPDATES = ["mixed", "mixed again", "all text"]
BUDGET, LONGEST = 60, 4
Case = tuple[str, str]
Runs = dict[Case, list[dict[str, Tensor]]]


def prompts(world: MediaWorld, update: str) -> list[Prompt]:
    """Of two ranks, the first half of the first."""
    media = [[], [], [0], [1, 2]] if update != "all text" else [[], [], [], []]
    return [world.prompt(f"{update} {i}", which, length=4 + i) for i, which in enumerate(media)]


def rollout(asked: list[Prompt]) -> Rollout:
    """Two responses to each prompt, the same ones on any rank."""
    groups = []
    for prompt in asked:
        generator = torch.Generator().manual_seed(len(prompt.token_ids))
        tokens = torch.randint(20, 300, (2, LONGEST), generator=generator)
        groups.append(
            [Response(ids, torch.full((LONGEST,), -5.0), "", "length", reward=i) for i, ids in enumerate(tokens)]
        )
    return Rollout(asked, groups, Sampling(max_new_tokens=LONGEST))


def _weights(folder: str, ranks: int, strategy: str) -> list[dict[str, Tensor]]:
    """After each update, of a run with a reference."""
    fabric = make_fabric(strategy, "32-true", accelerator="cpu", devices=ranks)
    fabric.launch()
    actor = ActorModule(folder, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9))
    module = RFTModule(actor, Algorithm("grpo", kl_coefficient=0.1))
    module.configure_model()
    world = media_world(actor.transformer.config.model_type)
    learner = Learner(fabric, Roles(fabric, {}), module, BUDGET, 1.0)
    found = []
    for update in UPDATES:
        asked = prompts(world, update)
        share = len(asked) // ranks
        own = asked[fabric.global_rank * share : (fabric.global_rank + 1) * share]
        batch = Batch.from_rollout(rollout(own), module.read(own))
        learner.prepare(batch, 1.0, LONGEST, len(batch))
        learner.update(batch, 1.0, LONGEST)
        found.append({name: weight.clone() for name, weight in module.export_parameters()})
    return found


def _runs(folders: dict[str, str], ranks: int, cases: list[Case]) -> Runs:
    return {(family, strategy): _weights(folders[family], ranks, strategy) for family, strategy in cases}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of one process, and of two under every strategy."""
    folders = {family: str(tmp_path_factory.mktemp(family)) for family, _ in CASES}
    for family, folder in folders.items():
        media_world(family).model.save_pretrained(folder)
        media_world(family).processor.save_pretrained(folder)
    (alone,) = on_ranks(1, _runs, folders, 1, [(family, "auto") for family in folders])
    return alone | on_ranks(2, _runs, folders, 2, CASES)[0]


@pytest.mark.parametrize(("family", "strategy"), CASES)
def test_every_update_is_that_of_one_process(family: str, strategy: str, runs: Runs) -> None:
    alone, several = runs[family, "auto"], runs[family, strategy]
    before = dict(media_world(family).weights())
    for one, other in zip(alone, several, strict=True):
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-6)
        tower = [name for name in one if name.startswith(media_world(family).tower)]
        assert max(float((one[name] - before[name]).abs().max()) for name in tower) > 1e-4
        before = one
