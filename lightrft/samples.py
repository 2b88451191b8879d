"""The one vocabulary of the data's way: ``Prompt -> Rollout -> scored Rollout -> Batch``.

Everything that travels from a prompt to a gradient is one of these containers, for text, images, audio and video alike.
They hold tensors, numbers and strings only, so their ``state_dict`` goes into a checkpoint as it is and comes back bit
by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Media:
    """Media of one prompt as *references* (path, URL-free data URI, bytes), in the order of their placeholders.

    Nothing is decoded before the processor needs it, and the responses of a group share one ``Media``.
    """

    images: tuple[Any, ...] = ()
    audios: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.images or self.audios or self.videos)

    def state_dict(self) -> dict[str, list[Any]]:
        return {"images": list(self.images), "audios": list(self.audios), "videos": list(self.videos)}

    @classmethod
    def from_state_dict(cls, state: dict[str, list[Any]]) -> Media:
        return cls(**{kind: tuple(items) for kind, items in state.items()})


@dataclass(eq=False)
class Prompt:
    """One question, ready for an engine.

    Attributes:
        uid: names one draw of one record (``source/row@epoch``); seeds of its responses derive from it.
        token_ids: int64 ``[P]``, the chat template applied.
        text: what ``token_ids`` spell.
        reference: the expected answer for rule rewards; ``None`` where there is none.
        label: name of the reward recipe; ``None`` selects the recipe ``default``.
        source: name of the data source, for metrics.
        media: images, audios, videos by reference.
        record: other columns of the record that a reward may want (numbers, strings, lists, dicts of these).
    """

    uid: str
    token_ids: Tensor
    text: str
    reference: str | None = None
    label: str | None = None
    source: str = ""
    media: Media = field(default_factory=Media)
    record: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"media": self.media.state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Prompt:
        return cls(**{**state, "media": Media.from_state_dict(state["media"])})


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. The same meaning in every engine.

    Args:
        max_new_tokens: longest response in tokens.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
        min_p: drop tokens less likely than this times the likeliest; 0 keeps all.
        stop: strings that end a response; the string's tokens stay in ``token_ids``, not in ``text``.
        stop_token_ids: token ids that end a response, besides the tokenizer's end of sequence.

    Raises:
        ValueError: a value outside its range.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
            "stop": (all(self.stop), "free of empty strings"),
        }
        for name, (holds, want) in rules.items():
            if not holds:
                raise ValueError(f"sampling.{name} is {getattr(self, name)!r}; it must be {want}.")


@dataclass(eq=False)
class Response:
    """One sampled answer and, once scored, its reward.

    Attributes:
        token_ids: int64 ``[T]``; the stop token, if one ended it, is the last. Empty for an aborted response.
        log_probs: float32 ``[T]`` nats, of the distribution each token was drawn from (temperature and truncation in).
        text: the response decoded without special tokens, cut before a stop string.
        finish_reason: ``stop`` (a stop token or string), ``length`` (``max_new_tokens`` reached), ``abort``.
        weight_version: version of the weights that sampled it.
        seed: the seed of its own random stream.
        reward: the scalar that trains; ``None`` until scored, or when nothing could be scored.
        reward_parts: unweighted score of each component of the recipe, by name.
        dropped: ``True`` when the failure policy takes it out of the update (its mask becomes all zero).
    """

    token_ids: Tensor
    log_probs: Tensor
    text: str
    finish_reason: FinishReason
    weight_version: int = 0
    seed: int = 0
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    dropped: bool = False

    def state_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(eq=False)
class Rollout:
    """Prompts of this rank and their groups of responses: what is scored, logged, saved, viewed and resumed.

    Attributes:
        prompts: ``P`` prompts.
        groups: ``groups[i]`` are the responses to ``prompts[i]``.
        sampling: how they were drawn.
    """

    prompts: list[Prompt]
    groups: list[list[Response]]
    sampling: Sampling

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.groups):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.groups)} groups of responses.")

    def __len__(self) -> int:
        """Number of responses."""
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[tuple[Prompt, Response]]:
        """Every response with its prompt, group by group."""
        return ((prompt, response) for prompt, group in zip(self.prompts, self.groups) for response in group)

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": [prompt.state_dict() for prompt in self.prompts],
            "groups": [[response.state_dict() for response in group] for group in self.groups],
            "sampling": {f.name: getattr(self.sampling, f.name) for f in fields(self.sampling)},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Rollout:
        return cls(
            prompts=[Prompt.from_state_dict(prompt) for prompt in state["prompts"]],
            groups=[[Response(**response) for response in group] for group in state["groups"]],
            sampling=Sampling(**state["sampling"]),
        )


@dataclass(eq=False)
class Batch:
    """What an optimizer step sees: ``B`` responses as ragged sequences, their per-token tensors padded to ``[B, T]``.

    Padding is only in these small tensors; the model is fed packed tokens (:mod:`lightrft.ops.packing`).

    Attributes:
        sequences: ``B`` int64 tensors, prompt then response.
        prompt_lengths: int64 ``[B]`` tokens.
        response_mask: bool ``[B, T]``; ``True`` where a token is trained on. A dropped response is all ``False``.
        group_ids: int64 ``[B]``; responses to one prompt share one.
        rewards: float32 ``[B]``.
        log_probs_rollout: float32 ``[B, T]`` nats, the engine's.
        log_probs_old: float32 ``[B, T]`` nats under the actor at the start of the update phase.
        log_probs_reference: float32 ``[B, T]`` nats under the frozen reference; zeros where the algorithm has none.
        advantages: float32 ``[B, T]``.
    """

    sequences: list[Tensor]
    prompt_lengths: Tensor
    response_mask: Tensor
    group_ids: Tensor
    rewards: Tensor
    log_probs_rollout: Tensor
    log_probs_old: Tensor
    log_probs_reference: Tensor
    advantages: Tensor

    @classmethod
    def from_rollout(cls, rollout: Rollout) -> Batch:
        """Lay a scored rollout out for training; log-probs and advantages that are not known yet are zero."""
        pairs = list(rollout)
        lengths = [len(response.token_ids) for _, response in pairs]
        shape = (len(pairs), max([1, *lengths]))
        mask = torch.zeros(shape, dtype=torch.bool)
        log_probs = torch.zeros(shape)
        for row, (_, response) in enumerate(pairs):
            mask[row, : lengths[row]] = not response.dropped
            log_probs[row, : lengths[row]] = response.log_probs
        return cls(
            sequences=[torch.cat([prompt.token_ids, response.token_ids]) for prompt, response in pairs],
            prompt_lengths=torch.tensor([len(prompt.token_ids) for prompt, _ in pairs], dtype=torch.int64),
            response_mask=mask,
            group_ids=torch.tensor([i for i, group in enumerate(rollout.groups) for _ in group], dtype=torch.int64),
            rewards=torch.tensor([response.reward or 0.0 for _, response in pairs], dtype=torch.float32),
            log_probs_rollout=log_probs,
            log_probs_old=torch.zeros(shape),
            log_probs_reference=torch.zeros(shape),
            advantages=torch.zeros(shape),
        )

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of prompt and response, per row."""
        return [len(sequence) for sequence in self.sequences]

    def select(self, rows: Sequence[int]) -> Batch:
        """The given rows, in the given order; ``T`` is kept."""
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        tensors = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "sequences"}
        return Batch(sequences=[self.sequences[row] for row in index.tolist()], **tensors)

    def to(self, device: torch.device) -> Batch:
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "sequences"}
        return Batch(sequences=[sequence.to(device) for sequence in self.sequences], **tensors)

    def state_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Batch:
        return cls(**state)
