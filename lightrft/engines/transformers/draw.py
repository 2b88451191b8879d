"""Drawing tokens inside ``transformers``' ``generate``: each row from its own seed, each with its log-prob."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightrft.engines.group import EngineGroup
from lightrft.samples import Sampling
from lightrft.whereabouts import mark


def uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """One stream of numbers in [0, 1) per seed: float64 ``[len(seeds), steps]``, on the CPU.

    A stream is the same for every ``steps`` up to its length, and drawing it leaves the global generators alone.
    """
    generator = torch.Generator()
    streams = torch.empty(len(seeds), steps, dtype=torch.float64)
    for stream, seed in zip(streams, seeds):
        stream.uniform_(generator=generator.manual_seed(seed))
    return streams


def inverse_cdf(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """The token whose slice of the cumulative distribution holds each row's number.

    Args:
        log_probs: float ``[B, V]`` nats; ``-inf`` where a token must not be drawn.
        uniform: float64 ``[B]`` in [0, 1].

    Returns:
        int64 ``[B]``; never a token of probability 0. A row with NaN gives some valid index.
    """
    cdf = log_probs.double().exp_().cumsum(-1)
    total = cdf[:, -1]
    # Strictly below the total, or rounding could pick the impossible tokens behind the last possible one.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1).clamp_(max=log_probs.shape[-1] - 1)


class GreedyWarper(LogitsProcessor):
    """Leaves only the likeliest token (the lowest id among equals), whose log-prob becomes 0."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, best, scores.gather(1, best))


class FirstTokenWarper(LogitsProcessor):
    """One distribution for the first token of every response, another for those after it.

    Args:
        first: what makes the first token's.
        later: what makes the others'.
        prompt_tokens: length of the padded prompts, by which the first token is known.
    """

    def __init__(self, first: Sequence[LogitsProcessor], later: Sequence[LogitsProcessor], prompt_tokens: int) -> None:
        self._first = LogitsProcessorList(first)
        self._later = LogitsProcessorList(later)
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._first if input_ids.shape[1] == self._prompt_tokens else self._later
        return chosen(input_ids, scores)


class SeededDraw(LogitsProcessor):
    """Draws the next token of every row from the scores it is given, records its log-prob and forces it.

    The last of the processors, under ``do_sample=False``: ``generate`` then takes the one token left.

    Args:
        uniforms: float64 ``[B, T]``, one number per row and step, on the scores' device.
        prompt_tokens: length of the padded prompts, by which the step is known.
        group: ranks that draw the same tokens, those of the first. Their scores may differ by rounding, and a token
            that only some of them drew would have them wait for each other for ever.

    Attributes:
        log_probs: float32 ``[B, T]`` nats of the drawn tokens under the distribution they were drawn from.
    """

    def __init__(self, uniforms: Tensor, prompt_tokens: int, group: EngineGroup) -> None:
        self.log_probs = torch.zeros(uniforms.shape, dtype=torch.float32, device=uniforms.device)
        self._uniforms = uniforms
        self._prompt_tokens = prompt_tokens
        self._group = group

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mark()
        step = input_ids.shape[1] - self._prompt_tokens
        log_probs = scores.float().log_softmax(-1)
        token = self._group.first(inverse_cdf(log_probs, self._uniforms[:, step]))[:, None]
        self.log_probs[:, step] = log_probs.gather(1, token).squeeze(1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def warpers(sampling: Sampling, prompt_tokens: int, never_drawn: Sequence[int] = ()) -> list[LogitsProcessor]:
    """The distributions that ``sampling`` asks for.

    Args:
        sampling: how responses are drawn.
        prompt_tokens: length of the padded prompts.
        never_drawn: ids that are not drawn.
    """
    never = [SuppressTokensLogitsProcessor(list(never_drawn))] if never_drawn else []
    later = _regular(sampling)
    if sampling.fire is None:
        return never + later
    # Top-k first: divided by a high temperature, logits that differ may round to the same number.
    first = [TopKLogitsWarper(sampling.fire.top_k), TemperatureLogitsWarper(float(sampling.fire.temperature))]
    return [*never, FirstTokenWarper(first, later, prompt_tokens)]


def _regular(sampling: Sampling) -> list[LogitsProcessor]:
    """Temperature, then min-p, top-k, top-p, each only where it is on: vLLM's order."""
    if sampling.temperature == 0:
        return [GreedyWarper()]
    chosen: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        chosen.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.min_p > 0:
        chosen.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k > 0:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    return chosen
