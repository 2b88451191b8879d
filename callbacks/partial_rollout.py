"""PartialRollout: long responses do not hold the batch; the unfinished ones go on in the next iteration."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightrft import samples
from lightrft.callbacks.in_flight import Group, InFlight
from lightrft.engines import Engine
from lightrft.engines.continuation import after, joined, spelled
from lightrft.engines.seeds import continuation_seed
from lightrft.engines.stopping import Detokenizer
from lightrft.samples import Prompt, Response, Sampling
from lightrft.whereabouts import mark


@dataclass(frozen=True)
class _Request:
    """What the engine is asked: one call of ``generate`` takes those of one sampling."""

    prompt: Prompt
    sampling: Sampling
    seeds: list[int]


class PartialRollout(InFlight):
    """A rollout that ends when enough groups are complete, and carries the others over, unfinished as they are.

    All responses in flight are sampled segment by segment until as many groups are complete, over all ranks, as an
    iteration trains on: the first of them, in the order in which they began, are taken. The others keep their tokens
    with log-probs and weight versions, and go on with the next iteration's weights (partial rollout, Kimi k1.5, arXiv
    2501.12599). What is taken, and in what order, does not depend on the number of ranks.

    Args:
        engine, sampling: as in :class:`~lightrft.callbacks.Rollout`.
        segment_tokens: sampled of every response before the complete groups are counted again. A segment costs reading
            prompt and response anew where the engine has no prefix cache; a group may wait for one after its last
            token.
        groups_in_flight: carried from one iteration to the next, over all ranks.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling | None = None,
        segment_tokens: int = 256,
        groups_in_flight: int = 16,
    ) -> None:
        super().__init__(engine, sampling)
        if not 1 <= segment_tokens < self.sampling.max_new_tokens:
            raise ValueError(
                f"segment_tokens is {segment_tokens}; it must be at least 1 and below sampling.max_new_tokens "
                f"({self.sampling.max_new_tokens}), or no response is ever carried over."
            )
        if groups_in_flight < 1:
            raise ValueError(
                f"groups_in_flight is {groups_in_flight}; it must be at least 1. lightrft.callbacks.Rollout waits for "
                "every response."
            )
        self.segment_tokens = segment_tokens
        self.groups_in_flight = groups_in_flight

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._sharding = trainer.learner.sharding
        self._detokenizer = Detokenizer(pl_module.tokenizer)
        special = self._detokenizer.special_id
        self._stops = [stop for stop in self.sampling.stop if special(stop) is None]
        super().setup(trainer, pl_module, stage)

    def sample(
        self, prompts: Sequence[Prompt], *, samples_per_prompt: int, run_seed: int, iteration: int
    ) -> samples.Rollout:
        self._enter(prompts, samples_per_prompt, run_seed, iteration)
        wanted = len(self.pool) * self._ranks - self.groups_in_flight
        while sum((known := self._known()).values()) < wanted:
            self._advance()
        taken = set([number for number, complete in known.items() if complete][:wanted])
        kept = [number for number in known if number not in taken]
        parts = [{*self._dealt(sorted(taken), rank), *self._dealt(kept, rank)} for rank in range(self._ranks)]
        held = self._moved(parts)
        self.pool = [group for group in held if group.number not in taken]
        return self._rollout([group for group in held if group.number in taken])

    def on_score_end(self, trainer: Any, pl_module: Any, rollout: samples.Rollout) -> None:
        """Staleness, and how many responses go on in the next iteration."""
        super().on_score_end(trainer, pl_module, rollout)
        carried = sum(self._goes_on(response) for group in self.pool for response in group.responses)
        trainer.log("rollout/in_flight", float(self._sharding.over_ranks(torch.tensor(float(carried)), "sum")))

    # --- a segment ---------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One segment of every response that goes on. Collective over the engine's ranks."""
        mark("sampling a segment")
        begin = [group for group in self.pool if not group.responses]
        going = [(group, i) for group in self.pool for i, one in enumerate(group.responses) if self._goes_on(one)]
        first = [_Request(group.prompt, self._segment(0), group.seeds) for group in begin]
        answers = self._answers([*first, *(self._continuation(group, i) for group, i in going)])
        for group, responses in zip(begin, answers):
            group.responses = responses
        for (group, i), (more,) in zip(going, answers[len(begin) :], strict=True):
            group.responses[i] = response = joined(group.responses[i], more, self._stops, self._detokenizer)
            if not self._goes_on(response):
                response.text = spelled(response, self._stops, self._detokenizer)

    def _continuation(self, group: Group, index: int) -> _Request:
        begun, position = group.responses[index], len(group.responses[index].token_ids)
        seeds = [continuation_seed(group.seeds[index], position)]
        return _Request(after(group.prompt, begun), self._segment(position), seeds)

    def _segment(self, position: int) -> Sampling:
        tokens = min(self.segment_tokens, self.sampling.max_new_tokens - position)
        # FIRE is of a response's first token alone.
        return dataclasses.replace(self.sampling, max_new_tokens=tokens, fire=None if position else self.sampling.fire)

    def _answers(self, requests: Sequence[_Request]) -> list[list[Response]]:
        wanted = list(dict.fromkeys(request.sampling for request in requests))
        answers: dict[int, list[Response]] = {}
        # Each sampling is a call, in which all ranks of the engine take part.
        for sampling in dict.fromkeys(one for part in self._group.everyone(wanted) for one in part):
            numbers = [number for number, request in enumerate(requests) if request.sampling == sampling]
            asked = [requests[number] for number in numbers]
            prompts, seeds, own = self._group.join([one.prompt for one in asked], [one.seeds for one in asked])
            answers.update(zip(numbers, self.engine.generate(prompts, sampling, seeds)[own], strict=True))
        return [answers[number] for number in range(len(requests))]

    def _goes_on(self, response: Response) -> bool:
        return response.finish_reason == "length" and len(response.token_ids) < self.sampling.max_new_tokens

    # --- over ranks --------------------------------------------------------------------------------------------------

    def _known(self) -> dict[int, bool]:
        """Number of every group of all ranks, in order, and whether it is complete. Collective."""
        own = [(one.number, bool(one.responses) and not any(map(self._goes_on, one.responses))) for one in self.pool]
        return dict(sorted(known for part in self._sharding.everyone(own) for known in part))

    def _moved(self, parts: Sequence[set[int]]) -> list[Group]:
        """Send every rank the groups of its part; this rank's, in order. Collective."""
        sent = [_packed([group for group in self.pool if group.number in part]) for part in parts]
        sizes = self._sharding.everyone([len(one) for one in sent])
        received = self._sharding.exchange(sent, [of_rank[self._rank] for of_rank in sizes])
        return sorted((group for one in received for group in _unpacked(one)), key=lambda group: group.number)


def _packed(groups: Sequence[Group]) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(groups)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> list[Group]:
    groups: list[Group] = pickle.loads(data.numpy().tobytes())
    return groups
