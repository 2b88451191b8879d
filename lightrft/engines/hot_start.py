"""FIRE's hot first token, for engines that draw a whole response in one way: drawn apart, then gone on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from lightrft.engines.continuation import after, joined, spelled
from lightrft.engines.seeds import continuation_seed
from lightrft.engines.stopping import Detokenizer
from lightrft.samples import Prompt, Response, Sampling

Generate = Callable[[Sequence[Prompt], Sampling, Sequence[Sequence[int]]], list[list[Response]]]


def with_hot_start(
    generate: Generate,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
    stops: Sequence[str],
    detokenizer: Detokenizer,
) -> list[list[Response]]:
    """Draw first tokens by ``sampling.fire``, and go on from each that does not end its response.

    Args:
        generate: the engine's, for sampling without ``fire``.
        prompts, sampling, seeds: as for :meth:`lightrft.engines.Engine.generate`.
        stops: stop strings that are no special tokens.
        detokenizer: decodes the joined parts.
    """
    if sampling.fire is None:
        return generate(prompts, sampling, seeds)
    hot = dataclasses.replace(
        sampling,
        max_new_tokens=1,
        temperature=sampling.fire.temperature,
        top_k=sampling.fire.top_k,
        top_p=1.0,
        min_p=0.0,
        fire=None,
    )
    groups = generate(prompts, hot, seeds)
    if sampling.max_new_tokens == 1:
        return groups
    going_on = [
        (prompt, group, index)
        for prompt, group in zip(prompts, groups)
        for index, first in enumerate(group)
        if first.finish_reason == "length"
    ]
    later = dataclasses.replace(sampling, max_new_tokens=sampling.max_new_tokens - 1, fire=None)
    begun = [after(prompt, group[index]) for prompt, group, index in going_on]
    rest = generate(begun, later, [[continuation_seed(group[index].seed, 1)] for _, group, index in going_on])
    for (_, group, index), (end,) in zip(going_on, rest):
        group[index] = response = joined(group[index], end, stops, detokenizer)
        response.text = spelled(response, stops, detokenizer)
    return groups
