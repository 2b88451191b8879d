"""The one vocabulary of the data's way: ``Prompt -> Rollout -> scored Rollout -> Batch``.

Everything that travels from a prompt to a gradient is one of these containers, for text, images, audio and video alike.
They hold tensors, numbers and strings only, so their ``state_dict`` goes into a checkpoint as it is and comes back bit
by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
FinishReason = Literal["stop", "length", "abort"]


PART_OF = {"images": "image", "audios": "audio", "videos": "video"}
"""Each field of :class:`Media`, and what chat templates, ``transformers`` and vLLM call one of it."""


@dataclass(frozen=True)
class Media:
    """Media of one prompt as *references* (path, data URI, bytes), in the order of their placeholders.

    Nothing is decoded before the processor needs it, and the responses of a group share one ``Media``. What code makes
    by hand may be decoded already, a ``PIL`` image or ``(samples, rate)``; a checkpoint that holds it cannot be loaded.
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
        token_ids: int64 ``[P]``, the chat template applied: one placeholder for each item of ``media``, as the template
            writes it. The model sees as many tokens as the item takes; :class:`~lightrft.media.MediaProcessor` expands
            them, and who computes log-probs must.
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


@dataclass(eq=False)
class MediaItem:
    """One image or audio as its model takes it.

    Attributes:
        kind: field of :class:`Media`.
        token_ids: int64 ``[N]``, what stands in the sequence in place of its placeholder.
        token_types: int64 ``[N]`` by name: what the processor says of each of them (``mm_token_type_ids``).
        features: tensors by the name of the model's argument, whose first dimensions are this item's alone.
    """

    kind: str
    token_ids: Tensor
    token_types: dict[str, Tensor]
    features: dict[str, Tensor]


@dataclass(eq=False)
class Reading:
    """A prompt as its model takes it.

    Attributes:
        token_ids: int64 ``[L]``, those of the prompt with each placeholder expanded.
        token_types: int64 ``[L]`` by name, zero on text; empty where the prompt has no media.
        items: in the order of the prompt's media, kind by kind.
    """

    token_ids: Tensor
    token_types: dict[str, Tensor] = field(default_factory=dict)
    items: list[MediaItem] = field(default_factory=list)

    @property
    def kinds(self) -> frozenset[str]:
        """Of its media."""
        return frozenset(item.kind for item in self.items)

    def map(self, change: Callable[[Tensor], Tensor]) -> Reading:
        """The same with every tensor changed, one after another and always in the same order."""

        def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(tensor) for name, tensor in tensors.items()}

        items = [
            MediaItem(item.kind, change(item.token_ids), changed(item.token_types), changed(item.features))
            for item in self.items
        ]
        return Reading(change(self.token_ids), changed(self.token_types), items)

    def to(self, device: torch.device | str) -> Reading:
        return self.map(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class FIRE:
    """A hot first token: drawn at a high temperature within the likeliest few, so that responses begin differently.

    Flaming-hot initiation with regular execution (arXiv 2410.21236): a temperature far above 1, within top-k so that
    the token stays plausible, for the first token alone. The implementation in verl takes 30 and 16.

    Args:
        temperature: divides the logits of the first token.
        top_k: the first token is one of this many likeliest; those as likely as the last of them count too.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 10.0
    top_k: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"sampling.fire.temperature is {self.temperature!r}; it must be above 0 and finite.")
        if self.top_k < 1:
            raise ValueError(f"sampling.fire.top_k is {self.top_k!r}; it must be at least 1.")


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. In every engine temperature comes first, then min-p, top-k and top-p in this order.

    Args:
        max_new_tokens: longest response in tokens.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
        min_p: drop tokens less likely than this times the likeliest; 0 keeps all.
        stop: strings that end a response; the string's tokens stay in ``token_ids``, not in ``text``.
        stop_token_ids: token ids that end a response, besides the tokenizer's end of sequence.
        fire: how the first token is drawn instead, ``temperature`` to ``min_p`` then being those of the later ones;
            ``None`` draws it like them.

    Raises:
        ValueError: a value outside its range, or ``fire`` where all is greedy.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    fire: FIRE | None = None

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
        if self.fire is not None and self.temperature == 0:
            raise ValueError(
                "sampling.temperature is 0, but sampling.fire is set: greedy decoding has no hot first token; set the "
                "temperature above 0 or fire to null."
            )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Sampling:
        fire = state.get("fire")
        return cls(**{**state, "fire": FIRE(**fire) if fire else None})


@dataclass(eq=False)
class Response:
    """One sampled answer and, once scored, its reward.

    Attributes:
        token_ids: int64 ``[T]``; the stop token, if one ended it, is the last. Empty for an aborted response.
        log_probs: float32 ``[T]`` nats, of the distribution each token was drawn from (temperature and truncation in).
        text: the response decoded without special tokens, cut before a stop string.
        finish_reason: ``stop`` (a stop token or string), ``length`` (``max_new_tokens`` reached), ``abort``.
        weight_version: version of the weights that sampled it, or where there were several, its last token.
        seed: the seed of its own random stream.
        reward: the scalar that trains; ``None`` until scored, or when nothing could be scored.
        reward_parts: unweighted score of each component of the recipe, by name.
        dropped: ``True`` when the failure policy takes it out of the update (its mask becomes all zero).
        segments: ``(tokens, version)``, in their order, of a response that several versions sampled; else empty.
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
    segments: list[tuple[int, int]] = field(default_factory=list)

    @property
    def versions(self) -> Tensor:
        """Version of the weights that sampled each token: int64 ``[T]``."""
        parts = torch.tensor(self.segments or [(len(self.token_ids), self.weight_version)], dtype=torch.int64)
        return parts[:, 1].repeat_interleave(parts[:, 0])

    def state_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(eq=False)
class Rollout:
    """Prompts of this rank and their groups of responses: what is scored, logged, saved, viewed and resumed.

    Attributes:
        prompts: ``P`` prompts.
        groups: ``groups[i]`` are the responses to ``prompts[i]``.
        sampling: how they were drawn.
        greedy: the greedy response to each prompt where the algorithm compares with it, else empty. Never trained on.
    """

    prompts: list[Prompt]
    groups: list[list[Response]]
    sampling: Sampling
    greedy: list[Response] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.groups):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.groups)} groups of responses.")

    def __len__(self) -> int:
        """Number of responses."""
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[tuple[Prompt, Response]]:
        """Every response with its prompt, group by group."""
        return ((prompt, response) for prompt, group in zip(self.prompts, self.groups) for response in group)

    def of_rows(self, of_prompts: Sequence[T]) -> list[T]:
        """What each prompt has, once for each of its responses."""
        return [own for own, group in zip(of_prompts, self.groups) for _ in group]

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": [prompt.state_dict() for prompt in self.prompts],
            "groups": [[response.state_dict() for response in group] for group in self.groups],
            "sampling": self.sampling.state_dict(),
            "greedy": [response.state_dict() for response in self.greedy],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Rollout:
        return cls(
            prompts=[Prompt.from_state_dict(prompt) for prompt in state["prompts"]],
            groups=[[Response(**response) for response in group] for group in state["groups"]],
            sampling=Sampling.from_state_dict(state["sampling"]),
            greedy=[Response(**response) for response in state["greedy"]],
        )


def _from_shapes() -> Any:
    """A field that :meth:`Batch.__post_init__` fills in where it is not given."""
    return field(default=None)


@dataclass(eq=False)
class Batch:
    """What an optimizer step sees: ``B`` responses as ragged sequences, their per-token tensors padded to ``[B, T]``.

    Padding is only in these small tensors; the model is fed packed tokens (:mod:`lightrft.ops.packing`).

    Attributes:
        sequences: ``B`` int64 tensors, prompt then response.
        prompt_lengths: int64 ``[B]`` tokens.
        response_mask: bool ``[B, T]``; ``True`` where a token is trained on. A dropped response is all ``False``.
        group_ids: int64 ``[B]``; responses to one prompt share one.
        rewards: float32 ``[B]``, from the advantages on with the algorithm's shaping.
        log_probs_rollout: float32 ``[B, T]`` nats, the engine's.
        readings: ``B``; what the model takes of the prompt's media, shared by its group; ``None`` where there are none.
        truncated: bool ``[B]``; the response was cut at the longest length.
        comparable: bool ``[B, T]``; the engine drew the token from the distribution the trainer gives log-probs of
            (FIRE's hot first token it did not).
        greedy_rewards: float32 ``[B]``, of the greedy response to the prompt; zeros where none was sampled.
        greedy_lengths: int64 ``[B]`` tokens of that response.
        log_probs_old: float32 ``[B, T]`` nats under the actor at the start of the update phase.
        entropy_old: float32 ``[B, T]`` nats, of the same policy.
        log_probs_reference: float32 ``[B, T]`` nats under the frozen reference; zeros where the algorithm has none.
        values_old: float32 ``[B, T]``, the critic's at the start of the update phase; zeros where there is none.
        advantages: float32 ``[B, T]``.
        returns: float32 ``[B, T]``, what the critic learns to predict.
        policy_weights: float32 ``[B, T]``; factor of each token's policy loss: the off-policy correction, 0 for a
            token that the algorithm filters out.

    What is not given is zero; ``comparable`` and ``policy_weights`` are one.
    """

    sequences: list[Tensor]
    prompt_lengths: Tensor
    response_mask: Tensor
    group_ids: Tensor
    rewards: Tensor
    log_probs_rollout: Tensor
    readings: list[Reading | None] = _from_shapes()
    truncated: Tensor = _from_shapes()
    comparable: Tensor = _from_shapes()
    greedy_rewards: Tensor = _from_shapes()
    greedy_lengths: Tensor = _from_shapes()
    log_probs_old: Tensor = _from_shapes()
    entropy_old: Tensor = _from_shapes()
    log_probs_reference: Tensor = _from_shapes()
    values_old: Tensor = _from_shapes()
    advantages: Tensor = _from_shapes()
    returns: Tensor = _from_shapes()
    policy_weights: Tensor = _from_shapes()

    def __post_init__(self) -> None:
        kinds = {"truncated": torch.bool, "comparable": torch.bool, "greedy_lengths": torch.int64}
        if self.readings is None:
            self.readings = [None] * len(self.sequences)
        for name in (f.name for f in fields(self) if getattr(self, f.name) is None):
            a_response = name in ("truncated", "greedy_rewards", "greedy_lengths")
            like = self.rewards if a_response else self.response_mask
            fill = name in ("comparable", "policy_weights")
            setattr(self, name, torch.full_like(like, fill, dtype=kinds.get(name, torch.float32)))

    @classmethod
    def from_rollout(cls, rollout: Rollout, readings: Sequence[Reading] | None = None) -> Batch:
        """Lay a scored rollout out for training; log-probs and advantages that are not known yet are zero.

        Args:
            rollout: scored.
            readings: of its prompts, where the model reads media.
        """
        of_row = rollout.of_rows(readings or [Reading(prompt.token_ids) for prompt in rollout.prompts])
        responses = [response for _, response in rollout]
        lengths = torch.tensor([len(response.token_ids) for response in responses], dtype=torch.int64)
        columns = torch.arange(max(1, int(lengths.max()) if len(lengths) else 1))
        kept = torch.tensor([not response.dropped for response in responses], dtype=torch.bool)
        mask = (columns < lengths[:, None]) & kept[:, None]
        # The first token of FIRE is drawn from a distribution of its own.
        comparable = (columns >= (rollout.sampling.fire is not None)).expand_as(mask)
        log_probs = torch.zeros(mask.shape)
        for row, response in enumerate(responses):
            log_probs[row, : lengths[row]] = response.log_probs
        batch = cls(
            sequences=[torch.cat([own.token_ids, response.token_ids]) for own, response in zip(of_row, responses)],
            prompt_lengths=torch.tensor([len(own.token_ids) for own in of_row], dtype=torch.int64),
            response_mask=mask,
            group_ids=torch.tensor([i for i, group in enumerate(rollout.groups) for _ in group], dtype=torch.int64),
            rewards=_rewards(responses),
            log_probs_rollout=log_probs,
            truncated=torch.tensor([response.finish_reason == "length" for response in responses], dtype=torch.bool),
            comparable=comparable.clone(),
        )
        batch.attach(of_row)
        if rollout.greedy:
            batch.greedy_rewards = _rewards(rollout.greedy)[batch.group_ids]
            batch.greedy_lengths = torch.tensor([len(one.token_ids) for one in rollout.greedy])[batch.group_ids]
        return batch

    def attach(self, readings: Sequence[Reading]) -> None:
        """What was read of the media of each row's prompt."""
        self.readings = [own if own.items else None for own in readings]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of prompt and response, per row."""
        return [len(sequence) for sequence in self.sequences]

    @property
    def response_lengths(self) -> Tensor:
        """int64 ``[B]`` tokens of each response, trained on or not."""
        lengths = torch.tensor(self.sequence_lengths, dtype=torch.int64, device=self.prompt_lengths.device)
        return lengths - self.prompt_lengths

    @property
    def columns(self) -> dict[str, Tensor]:
        """Every tensor, ``[B]`` or ``[B, T]``, by name: all but the sequences and what is read of their media."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("sequences", "readings")}

    def select(self, rows: Sequence[int]) -> Batch:
        """The given rows, in the given order; ``T`` is kept."""
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        columns = {name: column[index] for name, column in self.columns.items()}
        sequences, readings = ([of[row] for row in index.tolist()] for of in (self.sequences, self.readings))
        return Batch(sequences=sequences, readings=readings, **columns)

    def put(self, rows: Sequence[int], part: Batch) -> None:
        """Write the tensors of ``part``, which :meth:`select` took from the given rows, back into them."""
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        for name, column in self.columns.items():
            column[index] = getattr(part, name)

    def to(self, device: torch.device) -> Batch:
        columns = {name: column.to(device) for name, column in self.columns.items()}
        shared = {id(one): one.to(device) for one in self.readings if one is not None}
        return Batch(
            sequences=[sequence.to(device) for sequence in self.sequences],
            readings=[shared.get(id(one)) for one in self.readings],
            **columns,
        )

    def state_dict(self) -> dict[str, Any]:
        """Without what was read of media, which may be large: who loads it reads again (:meth:`attach`)."""
        return {"sequences": self.sequences, **self.columns}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Batch:
        return cls(**state)


def _rewards(responses: Sequence[Response]) -> Tensor:
    return torch.tensor([response.reward or 0.0 for response in responses], dtype=torch.float32)
