"""Ranks with other media, or none, end as one process with all rows does, under every strategy."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from media_worlds import MediaWorld, media_world
from ranks import on_ranks
from torch import Tensor

from lightrft.algorithms import Algorithm
from lightrft.learner import Learner
from lightrft.lightning_modules import ActorModule
from lightrft.media import MediaProcessor
from lightrft.module import RFTModule
from lightrft.samples import Batch, Prompt, Response, Rollout, Sampling
from lightrft.sequence_cost import SequenceCost
from lightrft.strategies import Roles, make_fabric
from lightrft.workload import Workload

CASES = [
    ("llava", "ddp"),  # some weights of its tower never get a gradient
    ("qwen2_audio", "ddp"),
    ("qwen2_audio", "fsdp2"),
    ("qwen2_audio", "zero3"),
    *[("qwen2_5_vl", strategy) for strategy in ("ddp", "fsdp2", "zero2", "zero3") if find_spec("torchvision")],
]
UPDATES = ["mixed", "mixed again", "all text"]
BUDGET, LONGEST = 60, 4
Case = tuple[str, str]


def prompts(world: MediaWorld, update: str) -> list[Prompt]:
    """Of two ranks, the first half of the first."""
    if update == "mixed again" and "videos" in MediaProcessor(world.processor).kinds:  # an image here, a film there
        text = [world.prompt(f"{update} {i}", [], length=4 + i) for i in range(2)]
        return [text[0], world.prompt("image", [0], length=5), text[1], world.moving("film", [], [0], length=5)]
    media = [[], [], [], [0, 1]] if update != "all text" else [[], [], [], []]
    return [world.prompt(f"{update} {i}", which, length=4 + i) for i, which in enumerate(media)]


def rollout(asked: list[Prompt]) -> Rollout:
    """Three responses to each prompt, the same ones on any rank: one more than there are ranks."""
    groups = []
    for prompt in asked:
        generator = torch.Generator().manual_seed(len(prompt.token_ids))
        tokens = torch.randint(20, 300, (3, LONGEST), generator=generator)
        groups.append(
            [Response(ids, torch.full((LONGEST,), -5.0), "", "length", reward=i) for i, ids in enumerate(tokens)]
        )
    return Rollout(asked, groups, Sampling(max_new_tokens=LONGEST))


class Run(NamedTuple):
    """Of one rank.

    Attributes:
        weights: after each update.
        media: of each update's micro-batches, whether its own rows have some.
        cost: of its sequences.
    """

    weights: list[dict[str, Tensor]]
    media: list[list[bool]]
    cost: SequenceCost


def _run(folder: str, ranks: int, strategy: str) -> Run:
    """Updates of a policy with a reference."""
    fabric = make_fabric(strategy, "32-true", accelerator="cpu", devices=ranks)
    fabric.launch()
    actor = ActorModule(folder, optimizer=lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9))
    module = RFTModule(actor, Algorithm("grpo", kl_coefficient=0.1))
    module.configure_model()
    world = media_world(actor.transformer.config.model_type)
    learner = Learner(fabric, Roles(fabric, {}), module, BUDGET, 1.0)
    found = Run([], [], learner.cost)
    for update in UPDATES:
        asked = prompts(world, update)
        share = len(asked) // ranks
        own = asked[fabric.global_rank * share : (fabric.global_rank + 1) * share]
        batch = Batch.from_rollout(rollout(own), module.read(own))
        learner.prepare(batch, 1.0, LONGEST, len(batch))
        learner.update(batch, 1.0, LONGEST)
        found.weights.append({name: weight.clone() for name, weight in module.export_parameters()})
        work = Workload(batch, learner.cost, BUDGET, learner.layout, learner.sharding)
        found.media.append([any(one is not None and one.items for one in part.readings) for part in work.micro_batches])
    return found


def _runs(folders: dict[str, str], ranks: int, cases: list[Case]) -> dict[Case, Run]:
    return {(family, strategy): _run(folders[family], ranks, strategy) for family, strategy in cases}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, Run]]:
    """Of one process and, rank by rank, of two under every strategy."""
    folders = {family: str(tmp_path_factory.mktemp(family)) for family, _ in CASES}
    for family, folder in folders.items():
        media_world(family).model.save_pretrained(folder)
        media_world(family).processor.save_pretrained(folder)
    alone = on_ranks(1, _runs, folders, 1, [(family, "auto") for family in folders])
    return alone + on_ranks(2, _runs, folders, 2, CASES)


@pytest.mark.parametrize(("family", "strategy"), CASES)
def test_every_update_is_that_of_one_process(family: str, strategy: str, runs: list[dict[Case, Run]]) -> None:
    alone, *ranks = runs
    expected, before = alone[family, "auto"].weights, dict(media_world(family).weights())
    for update, weights in enumerate(expected):
        for one in ranks:
            for name, weight in weights.items():
                torch.testing.assert_close(one[family, strategy].weights[update][name], weight, rtol=0, atol=1e-6)
        # Where nobody has media, by momentum.
        tower = [name for name in weights if name.startswith(media_world(family).tower)]
        assert max(float((weights[name] - before[name]).abs().max()) for name in tower) > 1e-4
        before = weights
    (tower,) = set(alone[family, "auto"].cost.towers.values())
    assert tower.weights > 0 and all(run[family, strategy].cost == alone[family, "auto"].cost for run in ranks)
    one, other = (run[family, strategy].media for run in ranks)
    assert one[:2] != other[:2] and not any(map(any, one[2:] + other[2:]))
