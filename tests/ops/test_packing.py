"""Packed rows hold every sequence once, compute no padding, and lead back to [B, T]."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.ops import pack, pad, split_by_tokens

Case = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]


@st.composite
def batches(draw: st.DrawFn) -> Case:
    """Ragged sequences with prompts of 1 to 4 tokens, responses of 0 to 5, and any mask inside the responses."""
    prompts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    responses = [draw(st.integers(0, 5)) for _ in prompts]
    sequences = [torch.arange(100 * i, 100 * i + p + r) for i, (p, r) in enumerate(zip(prompts, responses))]
    mask = torch.zeros(len(prompts), 5, dtype=torch.bool)
    for row, length in enumerate(responses):
        mask[row, :length] = torch.tensor(
            draw(st.lists(st.booleans(), min_size=length, max_size=length)), dtype=torch.bool
        )
    return sequences, torch.tensor(prompts), mask


@given(batches())
def test_predictions_are_the_positions_before_the_trained_tokens(case: Case) -> None:
    sequences, prompt_lengths, mask = case
    packed = pack(*case)
    targets = packed.scatter(packed.input_ids[packed.predict + 1])
    for row, column in mask.nonzero().tolist():
        assert targets[row, column] == sequences[row][prompt_lengths[row] + column]
    assert not targets[~mask].any() or mask.all()
    assert len(packed.predict) == int(mask.sum())


@given(batches())
def test_sequences_lie_one_after_another(case: Case) -> None:
    sequences, _, _ = case
    packed = pack(*case)
    assert torch.equal(packed.input_ids, torch.cat(sequences))
    assert torch.equal(packed.position_ids, torch.cat([torch.arange(len(s)) for s in sequences]))
    assert packed.cu_seqlens.tolist() == [0, *torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()]
    assert packed.cu_seqlens.dtype == torch.int32


@given(batches())
def test_scatter_is_differentiable_and_zero_elsewhere(case: Case) -> None:
    packed = pack(*case)
    values = torch.arange(1.0, 1 + len(packed.predict), requires_grad=True)
    padded = packed.scatter(values)
    assert padded.shape == case[2].shape
    assert torch.equal(padded != 0, case[2])
    padded.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


@given(batches())
def test_pad_keeps_every_token_once_in_order(case: Case) -> None:
    packed = pack(*case)
    padded, mask = pad(packed.input_ids, packed.cu_seqlens)
    assert torch.equal(padded[mask], packed.input_ids)
    assert not padded[~mask].any()


@pytest.mark.parametrize(
    ("prompt", "column"), [(0, 0), (2, 3)], ids=["first token of a sequence", "past the end of the sequence"]
)
def test_a_trained_token_outside_its_sequence_is_refused(prompt: int, column: int) -> None:
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, column] = True
    with pytest.raises(ValueError, match="outside its sequence"):
        pack([torch.arange(4)], torch.tensor([prompt]), mask)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_split_takes_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    parts = split_by_tokens(lengths, budget)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in part) <= budget or len(part) == 1 for part in parts)
    assert parts == split_by_tokens(lengths, budget)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_split_needs_one_part_where_all_fits(lengths: list[int]) -> None:
    assert split_by_tokens(lengths, sum(lengths)) == [list(range(len(lengths)))]


def test_a_long_row_goes_alone_and_spreads_no_others() -> None:
    assert split_by_tokens([4, 1000, 1, 5], 10) == [[1], [0, 2, 3]]


def test_split_is_even_and_stable_among_equals() -> None:
    assert split_by_tokens([3, 3, 3, 3], 6) == [[0, 2], [1, 3]]
    loads = [sum(part) for part in split_by_tokens(list(range(1, 41)), 210)]
    assert max(loads) - min(loads) <= 40


def test_as_many_parts_as_rows_of_more_than_half_the_budget_are_found_at_once() -> None:
    # Searched upwards from the sum of tokens with a scan of all parts for each row, this took minutes.
    assert len(split_by_tokens([9_900] * 4096, 16_384)) == 4096
    mixed = split_by_tokens([4_000 + 7 * (i * 7919 % 1285) for i in range(4096)], 16_384)
    assert len(mixed) < 2400


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 3]], ids=str)
def test_split_knows_empty_rows(lengths: list[int]) -> None:
    parts = split_by_tokens(lengths, 5)
    assert parts == ([list(range(len(lengths)))] if lengths else [])


def test_a_packed_batch_moves_with_all_it_has() -> None:
    packed = pack([torch.arange(4)], torch.tensor([2]), torch.tensor([[True, True]])).to(torch.device("meta"))
    assert {value.device.type for value in vars(packed).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert packed.shape == (1, 2)
