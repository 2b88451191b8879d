"""What a sequence is said to cost is what its forward computes, media and all."""

from __future__ import annotations

import pytest
import torch
from media_worlds import media_world
from torch.utils.flop_counter import FlopCounterMode

from lightrft.media import MediaProcessor
from lightrft.ops import joined_features
from lightrft.samples import Reading
from lightrft.sequence_cost import SequenceCost


def operations(model: torch.nn.Module, reading: Reading) -> int:
    """Of a forward, whose head is for every token."""
    types = {name: own[None] for name, own in reading.token_types.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=reading.token_ids[None], use_cache=False, **types, **joined_features(reading.items))
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_video_costs_what_its_frames_do(family: str) -> None:
    world = media_world(family)
    world.model.set_attn_implementation("eager")
    seen = MediaProcessor(world.processor).read(world.moving("seen", [], [1, 3]))
    text = Reading(torch.full((len(seen.token_ids),), int(seen.token_ids[0])))
    cost, length = SequenceCost.of(world.model), len(text.token_ids)
    expected = operations(world.model, seen) / operations(world.model, text)
    assert cost(length, seen) / cost(length) == pytest.approx(expected, rel=0.15) and expected > 1.5


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen2_audio"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_media_cost_what_their_tower_computes(family: str, frozen: bool) -> None:
    world = media_world(family)
    world.model.set_attn_implementation("eager")  # of which every operation is counted
    seen = MediaProcessor(world.processor).read(world.prompt("seen", [0, 1]))
    text = Reading(torch.full((len(seen.token_ids),), int(seen.token_ids[0])))
    for name, parameter in world.model.named_parameters():
        parameter.requires_grad_(not (frozen and (name.startswith(world.tower) or "projector" in name)))
    cost = SequenceCost.of(world.model)
    for parameter in world.model.parameters():
        parameter.requires_grad_(True)
    of_text, of_both = operations(world.model, text), operations(world.model, seen)
    # Backward too, of all but what is frozen.
    expected = ((of_both - of_text) * (1 / 3 if frozen else 1)) / of_text
    length = len(text.token_ids)
    assert (cost(length, seen) - cost(length)) / cost(length) == pytest.approx(expected, rel=0.15)
    assert cost(length, seen) > 1.1 * cost(length)
