from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.data import PromptStream
from lightrft.samples import Prompt


class Numbers:
    """A set of ``size`` prompts that are their index."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def prompt(self, index: int, draw: str) -> Prompt:
        assert 0 <= index < self.size
        return Prompt(f"{self.name}/{index}@{draw}", torch.tensor([index]), str(index), source=self.name)


SETS = [Numbers("a", 7), Numbers("b", 3), Numbers("c", 11)]
blends = st.one_of(st.none(), st.lists(st.floats(0.1, 1.0), min_size=3, max_size=3))


def uids(prompts: list[Prompt]) -> list[str]:
    return [prompt.uid for prompt in prompts]


def drawn(n: int, **options: object) -> list[str]:
    return uids(PromptStream(SETS, **options).take(n))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(blends, st.integers(0, 2**40), st.sampled_from([1, 2, 3, 4]), st.lists(st.integers(0, 4), max_size=8))
def test_blocks_of_the_ranks_joined_are_the_order_of_one_rank(
    probabilities: list[float] | None, seed: int, world_size: int, takes: list[int]
) -> None:
    ranks = [PromptStream(SETS, probabilities, seed, True, rank, world_size) for rank in range(world_size)]
    order: list[str] = []
    for take in takes:
        shares = [rank.take(take * world_size) for rank in ranks]
        assert [len(share) for share in shares] == [take] * world_size
        order += [uid for share in shares for uid in uids(share)]
    assert order == drawn(sum(takes) * world_size, probabilities=probabilities, seed=seed)
    assert len({str(rank.state_dict()) for rank in ranks}) == 1


@settings(max_examples=40, deadline=None)
@given(blends, st.booleans(), st.lists(st.integers(0, 20), max_size=6), st.integers(0, 30), st.sampled_from([1, 2]))
def test_a_resumed_stream_continues_exactly_on_any_number_of_ranks(
    probabilities: list[float] | None, shuffle: bool, takes: list[int], more: int, world_size: int
) -> None:
    options = {"probabilities": probabilities, "shuffle": shuffle, "seed": 5}
    stream = PromptStream(SETS, **options)  # type: ignore[arg-type]
    before = [uid for take in takes for uid in uids(stream.take(take))]
    resumed = [PromptStream(SETS, rank=rank, world_size=world_size, **options) for rank in range(world_size)]  # type: ignore[arg-type]
    for one in resumed:
        one.load_state_dict(stream.state_dict())
    after = [uid for one in resumed for uid in uids(one.take(more * world_size))]
    assert before + after == drawn(sum(takes) + more * world_size, **options)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_record_once_in_a_new_order(shuffle: bool) -> None:
    stream = PromptStream(SETS, seed=1, shuffle=shuffle)
    epochs = [uids(stream.take(len(stream))) for _ in range(4)]
    records = [f"{one.name}/{index}" for one in SETS for index in range(len(one))]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == sorted(f"{record}@{number}" for record in records)
    orders = [[uid.split("@")[0] for uid in epoch] for epoch in epochs]
    assert all((one != other) == shuffle for one, other in pairwise(orders))
    if not shuffle:
        assert orders[0] == records


@pytest.mark.parametrize("probabilities", [None, [1.0, 1.0, 1.0]])
def test_no_two_draws_share_a_uid(probabilities: list[float] | None) -> None:
    order = drawn(500, probabilities=probabilities)
    assert len(set(order)) == 500


def test_a_blend_draws_sources_by_their_probability_and_each_goes_through_its_records() -> None:
    order = drawn(6000, probabilities=[6.0, 3.0, 1.0], seed=3)
    shares = Counter(uid[0] for uid in order)
    # Four standard deviations of a binomial share.
    assert shares["a"] / 6000 == pytest.approx(0.6, abs=0.026)
    assert shares["b"] / 6000 == pytest.approx(0.3, abs=0.024)
    first_of_c = [uid for uid in order if uid[0] == "c"][:11]
    assert sorted(first_of_c) == sorted(f"c/{index}@0" for index in range(11))


def test_the_seed_decides_the_order_and_the_choice_of_sources() -> None:
    assert drawn(21, seed=1) != drawn(21, seed=2)
    sources = [[uid[0] for uid in drawn(50, seed=seed, probabilities=[1.0, 1.0, 1.0])] for seed in (1, 2)]
    assert sources[0] != sources[1]


def test_the_order_is_the_same_in_every_process_and_version() -> None:
    stream = PromptStream([Numbers("a", 5), Numbers("b", 5)], [0.5, 0.5], seed=7)
    assert uids(stream.take(6)) == ["b/1@0", "a/1@0", "b/3@0", "a/2@0", "a/0@0", "b/2@0"]


def test_prompts_that_do_not_divide_among_the_ranks_are_refused_and_nothing_is_drawn() -> None:
    stream = PromptStream(SETS, rank=1, world_size=4)
    with pytest.raises(
        ValueError, match=r"^6 prompts cannot be divided evenly among 4 ranks; take a multiple of it\.$"
    ):
        stream.take(6)
    with pytest.raises(ValueError, match="-4 prompts"):
        stream.take(-4)
    assert stream.state_dict()["drawn"] == 0


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (PromptStream([Numbers("a", 8), *SETS[1:]]), r"sources \[\['a', 7\].* there, \[\['a', 8\].* here"),
        (PromptStream(SETS[:2]), "sources"),
        (PromptStream([*SETS[:2], Numbers("d", 11)]), "sources"),
        (PromptStream([SETS[1], SETS[0], SETS[2]]), "sources"),
        (PromptStream(SETS, seed=1), "seed 0 there, 1 here"),
        (PromptStream(SETS, shuffle=False), "shuffle True there, False here"),
        (PromptStream(SETS, [1.0, 1.0, 1.0]), "blended False there, True here"),
    ],
)
def test_a_state_of_other_data_is_refused(other: PromptStream, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(PromptStream(SETS).state_dict())


def test_the_state_is_plain_and_does_not_change_with_the_stream() -> None:
    stream = PromptStream(SETS, [1.0, 1.0, 1.0])
    stream.take(5)
    state = stream.state_dict()
    stream.take(5)
    assert state["drawn"] == sum(state["counts"]) == 5
    stream.load_state_dict(state)
    stream.take(5)
    assert state["drawn"] == sum(state["counts"]) == 5


def test_a_stream_is_not_iterated_by_mistake() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        iter(PromptStream(SETS))  # type: ignore[call-overload]
