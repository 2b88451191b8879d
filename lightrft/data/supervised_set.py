"""Conversations as tokens to learn: the usable records of a source, and a batch of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightrft.data.chat import Chat
from lightrft.data.placeholders import as_parts, shown
from lightrft.data.records import BadRecord, Message, OnBadRecord, lookup, media_of, messages_of, screen
from lightrft.data.sources import SupervisedSource
from lightrft.data.turns import Segment, conversation, encode, encode_pair
from lightrft.media import MediaError, MediaProcessor
from lightrft.samples import Media, Prompt, Reading

Lesson = tuple[Tensor, Tensor, Reading | None]
"""Token ids int64 ``[L]``, loss mask bool ``[L]``, and what the model takes beside them where there are media."""


@dataclass(eq=False)
class SupervisedBatch:
    """Sequences to learn, ragged.

    Attributes:
        sequences: ``B`` int64 tensors ``[L_i]``.
        loss_masks: ``B`` bool tensors ``[L_i]``; ``True`` where a token is learned.
        tokens_per_microbatch: most tokens that one forward may hold.
        readings: ``B``; what the model takes beside the tokens, ``None`` where there are no media.
    """

    sequences: list[Tensor]
    loss_masks: list[Tensor]
    tokens_per_microbatch: int = 16384
    readings: list[Reading | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.readings = self.readings or [None] * len(self.sequences)

    def __len__(self) -> int:
        return len(self.sequences)

    @classmethod
    def collate(cls, rows: list[Lesson], tokens_per_microbatch: int = 16384) -> SupervisedBatch:
        """The rows of a DataLoader as a batch."""
        sequences, loss_masks, readings = (list(column) for column in zip(*rows))
        return cls(sequences, loss_masks, tokens_per_microbatch, readings)

    def select(self, rows: list[int]) -> SupervisedBatch:
        """These rows alone."""
        return SupervisedBatch(
            sequences=[self.sequences[row] for row in rows],
            loss_masks=[self.loss_masks[row] for row in rows],
            tokens_per_microbatch=self.tokens_per_microbatch,
            readings=[self.readings[row] for row in rows],
        )

    def joined(self, untrained: Reading) -> SupervisedBatch:
        """With a sequence more, of which nothing is learned."""
        return SupervisedBatch(
            sequences=[*self.sequences, untrained.token_ids],
            loss_masks=[*self.loss_masks, torch.zeros_like(untrained.token_ids, dtype=torch.bool)],
            tokens_per_microbatch=self.tokens_per_microbatch,
            readings=[*self.readings, untrained],
        )

    def to(self, device: torch.device) -> SupervisedBatch:
        return SupervisedBatch(
            sequences=[ids.to(device) for ids in self.sequences],
            loss_masks=[mask.to(device) for mask in self.loss_masks],
            tokens_per_microbatch=self.tokens_per_microbatch,
            readings=[one and one.to(device) for one in self.readings],
        )


class SupervisedSet(Dataset):
    """The usable records of a source as tokens to learn, every one checked once, its images and audio read.

    A record is one sequence, or several where the chat template rewrites earlier turns
    (:func:`lightrft.data.turns.conversation`).

    Args:
        source: where they come from.
        chat: how conversations are spelled.
        media: reads images and audio for the model; ``None`` where it reads text alone.
        max_tokens: longer sequences are bad records; images and audio count as what the model makes of them.
        on_bad_record: ``raise``, or ``skip`` those that cannot be used.

    Attributes:
        bad_records: why records were skipped, each reason with ``source/row``.

    Raises:
        FileNotFoundError: there are no such data.
        ValueError: records cannot be used, or the tokenizer cannot end a raw response.
    """

    def __init__(
        self,
        source: SupervisedSource,
        chat: Chat,
        media: MediaProcessor | None = None,
        max_tokens: int | None = None,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        self._source, self._chat, self._media, self._max_tokens = source, chat, media, max_tokens
        self._folder = source.folder
        if not chat.templated and chat.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end of sequence token for raw responses to end with; give it one.")
        self._raw = source.load()
        counts, self.bad_records = screen(source.name, len(self._raw), self._check, on_bad_record)
        self._items = torch.tensor([(row, part) for row, count in counts.items() for part in range(count)])

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Lesson:
        """One sequence, its media read anew."""
        row, part = self._items[index].tolist()
        return self._encode(row, *self._read(row)[part])

    def _read(self, row: int) -> list[tuple[list[Segment], Media]]:
        """Sequences of a record, each with its media."""
        try:
            raw = self._raw[row]
        except ValueError as error:
            raise BadRecord(str(error)) from error
        if not isinstance(raw, dict):
            raise BadRecord(f"it is a {type(raw).__name__}, not an object with keys")
        if raw.get(self._source.messages_key) is not None:
            messages = messages_of(raw[self._source.messages_key], self._source.messages_key)
        else:
            prompt, response = self._prompt(raw), self._text(raw, self._source.response_key)
            if isinstance(prompt, str) and not self._chat.templated:
                media = self._media_of(raw, prompt)
                spelled = self._media.spelled(prompt, media) if self._media is not None else prompt
                return [([(spelled, False), (response, True)], media)]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = [*messages, {"role": "assistant", "content": response}]
        media = self._media_of(raw, messages)
        if not self._chat.templated:
            raise BadRecord("messages need a chat template; use a chat tokenizer, or records of prompt and response")
        in_parts: Any = as_parts(messages, media)
        sequences = conversation(in_parts, self._chat)
        return [(segments, shown(in_parts[:messages_shown], media)) for messages_shown, segments in sequences]

    def _encode(self, row: int, segments: list[Segment], media: Media) -> Lesson:
        ids, mask = self._tokens(segments)
        if self._media is None:
            return ids, mask, None
        reading = self._media.read(Prompt(f"{self._source.name}/{row}", ids, text="", media=media))
        return (reading.token_ids, self._media.expand(mask, ids, reading), reading) if media else (ids, mask, None)

    def _tokens(self, segments: list[Segment]) -> tuple[Tensor, Tensor]:
        if self._chat.templated:
            return encode(segments, self._chat)
        (prompt, _), (response, _) = segments
        return encode_pair(prompt, response, self._chat)

    def _check(self, row: int) -> int:
        sequences = self._read(row)
        if self._max_tokens is None and self._media is None:
            return len(sequences)
        try:
            tokens = max(len(self._encode(row, *sequence)[0]) for sequence in sequences)
        except MediaError as error:
            raise BadRecord(str(error)) from error
        if self._max_tokens is not None and tokens > self._max_tokens:
            raise BadRecord(f"it has {tokens} tokens, more than max_tokens {self._max_tokens}")
        return len(sequences)

    def _prompt(self, raw: dict[str, Any]) -> str | list[Message]:
        key = self._source.prompt_key
        if key not in raw and self._source.messages_key not in raw:
            keys = ", ".join(map(repr, raw)) or "no keys"
            raise BadRecord(f"there is neither {self._source.messages_key!r} nor {key!r}; the record has {keys}")
        value = lookup(raw, key)
        return messages_of(value, key) if isinstance(value, list) else self._text(raw, key)

    def _text(self, raw: dict[str, Any], key: str) -> str:
        value = lookup(raw, key)
        if not isinstance(value, str) or not value.strip():
            raise BadRecord(f"{key!r} must be text that is not empty")
        return value

    def _media_of(self, raw: dict[str, Any], text: str | list[Message]) -> Media:
        if self._media is not None:
            return media_of(raw, text, self._source, self._folder)
        columns = [key for key in self._source.keys_of_media.values() if raw.get(key)]
        parts = [] if isinstance(text, str) else [one for one in text if not isinstance(one["content"], str)]
        if columns or parts:
            raise BadRecord("it has images, audio or video, but the model reads text alone")
        return Media()
