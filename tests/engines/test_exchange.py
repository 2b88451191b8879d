"""What ranks of a group tell each other: requests of all, responses of the first, as tensors."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import ranks
import torch
import torch.distributed as dist

from lightrft.engines import EngineGroup
from lightrft.samples import Media, Prompt, Response


def request(rank: int, index: int) -> Prompt:
    media = Media(images=(b"pixels",)) if (rank, index) == (1, 0) else Media()
    return Prompt(f"sums/{rank}·{index}@0", torch.arange(rank + 3 * index), "unread", media=media)


def seeds_of(rank: int, index: int) -> list[int]:
    return [2**62 + rank, *range(index)]


def of_everyone(group: EngineGroup, counts: tuple[int, ...]) -> list[Any]:
    prompts = [request(group.rank, index) for index in range(counts[group.rank])]
    asked, seeds, own = group.join(prompts, [seeds_of(group.rank, index) for index in range(len(prompts))])
    assert [one.uid for one in asked[own]] == [prompt.uid for prompt in prompts]
    return [(one.uid, one.token_ids.tolist(), one.media, drawn) for one, drawn in zip(asked, seeds, strict=True)]


def without_pickles(work: Any, *arguments: Any) -> Any:
    """The process group's own pickling is out of reach."""
    dist.init_process_group("gloo")
    group = EngineGroup(dist.get_world_size())
    with patch.object(dist, "all_gather_object", None), patch.object(dist, "broadcast_object_list", None):
        return work(group, *arguments)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0), (2, 0, 1)])
def test_each_rank_gets_the_requests_of_all_in_their_order(counts: tuple[int, ...]) -> None:
    pairs = [(rank, index) for rank, count in enumerate(counts) for index in range(count)]
    prompts = [request(*pair) for pair in pairs]
    expected = [(one.uid, one.token_ids.tolist(), one.media, seeds_of(*pair)) for one, pair in zip(prompts, pairs)]
    for found in ranks.on_ranks(len(counts), without_pickles, of_everyone, counts):
        assert found == expected


def test_a_group_of_one_keeps_its_requests() -> None:
    asked, seeds, own = EngineGroup().join([request(0, 1)], [(4, 5)])
    assert (asked[0].uid, asked[0].text, seeds, own) == ("sums/0·1@0", "unread", [[4, 5]], slice(0, 1))


GROUPS = [
    [[], [Response(torch.tensor([3, 1]), torch.tensor([-0.5, -2.0]), "ä", "length", 7, 2**62)]],
    [[Response(torch.tensor([1]), torch.tensor([-0.25]), "", "stop", 7, index) for index in range(3)]],
    [],
]


def of_the_first(group: EngineGroup, case: int) -> list[Any]:
    return states(group.from_first(GROUPS[case] if group.rank == 0 else None))


def states(groups: list[list[Response]]) -> list[Any]:
    def plain(response: Response) -> dict[str, Any]:
        tensors = {"token_ids": response.token_ids.tolist(), "log_probs": response.log_probs.tolist()}
        return response.state_dict() | tensors

    return [[plain(response) for response in group] for group in groups]


@pytest.mark.parametrize("case", range(len(GROUPS)))
def test_each_rank_gets_the_responses_of_the_first(case: int) -> None:
    assert ranks.on_ranks(2, without_pickles, of_the_first, case) == [states(GROUPS[case])] * 2
    assert states(EngineGroup().from_first(GROUPS[case])) == states(GROUPS[case])
