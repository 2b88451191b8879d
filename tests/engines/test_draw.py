"""Drawing by inverse CDF, and the streams of numbers behind it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from lightrft.engines.transformers.draw import GreedyWarper, inverse_cdf, uniforms, warpers
from lightrft.samples import FIRE, Sampling

logits = st.lists(st.one_of(st.floats(-80, 80, width=32), st.just(float("-inf"))), min_size=1, max_size=40)
edges = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1 - 2.0**-53, 2.0**-1074]))


@given(logits, edges)
def test_a_token_of_probability_zero_is_never_drawn(row, uniform):
    row[len(row) // 2] = 0.0  # one possible token at least
    log_probs = torch.tensor([row]).log_softmax(-1)
    token = int(inverse_cdf(log_probs, torch.tensor([uniform], dtype=torch.float64)))
    assert float(log_probs[0, token].double().exp()) > 0


def test_numbers_fall_into_the_slices_of_their_tokens():
    log_probs = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(6, -1)
    numbers = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 0.9999], dtype=torch.float64)
    assert inverse_cdf(log_probs, numbers).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_row_with_nan_stays_inside_the_vocabulary():
    token = int(inverse_cdf(torch.full((1, 5), torch.nan), torch.tensor([0.5], dtype=torch.float64)))
    assert 0 <= token < 5


def test_a_stream_depends_on_its_seed_alone():
    long, short = uniforms([7, 8, 7], 100), uniforms([8], 3)
    assert torch.equal(long[0], long[2])
    assert torch.equal(long[1, :3], short[0])
    assert len(uniforms(range(50), 40).unique()) == 2000
    assert float(long.min()) >= 0 and float(long.max()) < 1


def test_greedy_breaks_ties_to_the_lowest_id():
    left = GreedyWarper()(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[1.0, 3.0, 3.0]]))
    assert left.softmax(-1).tolist() == [[0.0, 1.0, 0.0]]


def test_only_what_is_asked_for_is_processed():
    assert warpers(Sampling(), 5) == []
    assert len(warpers(Sampling(temperature=2, top_k=3, top_p=0.5, min_p=0.1), 5)) == 4
    assert [type(w) for w in warpers(Sampling(temperature=0, top_k=3, top_p=0.5), 5)] == [GreedyWarper]


def warped(sampling: Sampling, tokens: int, scores: torch.Tensor) -> torch.Tensor:
    """Scores ``[V]`` of the next token after ``tokens`` tokens, of which 3 are the prompt's."""
    return LogitsProcessorList(warpers(sampling, 3))(torch.zeros(1, tokens, dtype=torch.int64), scores[None])[0]


def test_the_token_after_the_prompt_alone_is_hot():
    sampling = Sampling(temperature=0.5, top_k=1, top_p=0.1, min_p=0.9, fire=FIRE(temperature=10, top_k=2))
    scores = torch.tensor([3.0, 4.0, 2.0])
    assert torch.equal(warped(sampling, 3, scores), torch.tensor([0.3, 0.4, -torch.inf]))
    for tokens in (4, 5, 100):
        assert torch.equal(warped(sampling, tokens, scores), torch.tensor([-torch.inf, 8.0, -torch.inf]))


def test_tokens_that_the_hot_temperature_makes_equal_are_not_more_than_top_k():
    scores = 1.9 + torch.arange(16) * 2.0**-23  # neighbouring numbers, of which some are one after the division
    assert len(scores.unique()) == 16 > len((scores / 10).unique())
    left = [int(warped(Sampling(fire=FIRE(top_k=k)), 3, scores).isfinite().sum()) for k in range(1, 17)]
    assert left == list(range(1, 17))
