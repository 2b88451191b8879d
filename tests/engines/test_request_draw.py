"""Drawing for many requests at once: the distributions asked for, by seed and position alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightrft.engines.sglang import request_draw
from lightrft.engines.sglang.request_draw import Requests, draw, hot, uniforms_at
from lightrft.samples import Sampling

from .contract import assert_drawn_from, processed_log_probs

ALL = 1 << 30  # how SGLang says that top-k is off


def requests(samplings: list[Sampling], seeds: list[int], position: int = 7) -> Requests:
    return Requests(
        temperature=torch.tensor([one.temperature for one in samplings]),
        top_k=torch.tensor([one.top_k or ALL for one in samplings], dtype=torch.int32),
        top_p=torch.tensor([one.top_p for one in samplings]),
        min_p=torch.tensor([one.min_p for one in samplings]),
        seed=torch.tensor(seeds),
        position=torch.full((len(seeds),), position),
        truncated=any(one.top_k or one.top_p < 1 or one.min_p for one in samplings),
    )


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(temperature=1.3, top_p=0.9, top_k=12),
    Sampling(temperature=1.3, top_k=12, min_p=0.05),
    Sampling(top_p=0.6, min_p=0.2),
]


@pytest.mark.parametrize("logits_at_a_time", [1 << 24, 100])
def test_each_request_has_the_log_prob_of_its_own_distribution(monkeypatch, logits_at_a_time):
    monkeypatch.setattr(request_draw, "_LOGITS", logits_at_a_time)
    samplings = SAMPLINGS * 20
    logits = 3 * torch.randn(len(samplings), 64)
    before = logits.clone()
    tokens, log_probs = draw(logits, requests(samplings, list(range(len(samplings)))))
    assert torch.equal(logits, before)
    for row, (sampling, token) in enumerate(zip(samplings, tokens)):
        expected = processed_log_probs(logits[row : row + 1], sampling)[0, token].float()
        assert torch.allclose(log_probs[row], expected, atol=1e-5)


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[5]], ids=str)
def test_tokens_come_as_often_as_their_distribution_says(sampling):
    logits, draws = 2 * torch.randn(1, 64), 3000
    tokens, _ = draw(logits.expand(draws, -1), requests([sampling] * draws, list(range(draws))))
    assert_drawn_from(tokens, processed_log_probs(logits, sampling).exp().expand(draws, -1))


def test_a_request_is_drawn_alike_in_any_batch_and_differently_at_other_positions():
    logits = torch.randn(40, 500)
    together, _ = draw(logits, requests([Sampling()] * 40, list(range(40))))
    alone = [draw(logits[i : i + 1], requests([Sampling()], [i]))[0][0] for i in range(40)]
    truncated, _ = draw(logits, requests([Sampling()] * 39 + [Sampling(top_k=3)], list(range(40))))
    later, _ = draw(logits, requests([Sampling()] * 40, list(range(40)), position=8))
    assert together.tolist() == [int(token) for token in alone]
    assert together[:39].tolist() == truncated[:39].tolist()
    assert (together == later).float().mean() < 0.5


def test_hot_requests_draw_from_the_likeliest_and_the_others_as_ever():
    logits, draws = 4 * torch.randn(1, 64), 2000
    plain = requests([Sampling(temperature=0.5, min_p=0.3)] * draws, list(range(draws)))
    assert plain.truncated
    now = torch.arange(draws) % 2 == 0
    mixed = hot(plain, now, torch.full((draws,), 1e6, dtype=torch.float64), torch.full((draws,), 8))
    tokens, log_probs = draw(logits.expand(draws, -1), mixed)
    uniform = torch.zeros(64, dtype=torch.float64).index_fill_(0, logits[0].topk(8).indices, 1 / 8)
    assert_drawn_from(tokens[now], uniform.expand(draws // 2, -1))
    assert torch.allclose(log_probs[now], torch.tensor(1 / 8).log(), atol=1e-4)
    assert torch.equal(tokens[~now], draw(logits.expand(draws, -1), plain)[0][~now])


@pytest.mark.parametrize("others", [[], [Sampling()]], ids=["all greedy", "one of them not"])
def test_greedy_requests_take_the_likeliest_the_first_among_equals_with_log_prob_zero(others):
    samplings = [Sampling(top_k=1)] * 5 + others
    logits = torch.randn(len(samplings), 64).round()  # equals
    asked = dataclasses.replace(requests(samplings, [0] * len(samplings)), greedy=not others)
    tokens, log_probs = draw(logits, asked)
    assert tokens[:5].tolist() == logits.argmax(-1)[:5].tolist() and log_probs[:5].tolist() == [0.0] * 5


def test_streams_are_uniform_and_unrelated_between_seeds_and_positions():
    seeds = torch.arange(1000).repeat_interleave(100)
    numbers = uniforms_at(seeds, torch.arange(100).repeat(1000)).view(1000, 100)
    assert numbers.min() >= 0 and numbers.max() < 1 and numbers.unique().numel() == numbers.numel()
    counts = torch.histc(numbers.float(), 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * 198**0.5
    for one, other in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / one.numel() ** 0.5
