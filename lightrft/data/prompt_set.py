"""The records of one source as prompts."""

from __future__ import annotations

from typing import Any

import torch

from lightrft.data.chat import Chat
from lightrft.data.placeholders import as_parts
from lightrft.data.records import BadRecord, OnBadRecord, Record, read_record, screen
from lightrft.data.sources import PromptSource
from lightrft.media import MediaError, MediaProcessor
from lightrft.samples import Prompt


class PromptSet:
    """The usable records of a source, every one read and spelled once so that none fails later.

    Args:
        source: where they come from.
        chat: how they are spelled.
        media: reads images and audio for the model; ``None`` where it reads text alone.
        max_prompt_tokens: longer prompts are bad records; images and audio count as what the model makes of them.
        on_bad_record: ``raise``, or ``skip`` those that cannot be used.
        context_tokens: what the model's context leaves for a prompt; longer ones are bad records.

    Attributes:
        name: the source's.
        labels: the reward recipes they ask for.
        bad_records: why records were skipped, each reason with ``source/row``.

    Raises:
        FileNotFoundError: there are no such data.
        ValueError: records cannot be used.
    """

    def __init__(
        self,
        source: PromptSource,
        chat: Chat,
        media: MediaProcessor | None = None,
        max_prompt_tokens: int | None = None,
        on_bad_record: OnBadRecord = "raise",
        context_tokens: int | None = None,
    ) -> None:
        self.name = source.name
        self._source, self._chat, self._media, self._folder = source, chat, media, source.folder
        self._max_prompt_tokens, self._context_tokens = max_prompt_tokens, context_tokens
        self._raw = source.load()
        labels, self.bad_records = screen(self.name, len(self._raw), self._check, on_bad_record)
        self.labels = set(labels.values())
        self._rows = torch.tensor(list(labels))

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, index: int, draw: str) -> Prompt:
        """The ``index``-th usable record; ``draw`` tells this use of it from others."""
        row = int(self._rows[index])
        return self._prompt(row, *self._read(row), draw)

    def _prompt(self, row: int, record: Record, text: str, draw: str) -> Prompt:
        return Prompt(
            uid=f"{self.name}/{row}@{draw}",
            token_ids=torch.tensor(self._chat.prompt_ids(text), dtype=torch.int64),
            text=text,
            reference=record.reference,
            label=record.label,
            source=self.name,
            media=record.media,
            record=record.columns,
        )

    def _read(self, row: int) -> tuple[Record, str]:
        try:
            raw: Any = self._raw[row]
        except ValueError as error:
            raise BadRecord(str(error)) from error
        record = read_record(raw, self._source, self._folder)
        if self._chat.templated:
            return record, self._chat.prompt(as_parts(record.input, record.media))
        text = self._chat.prompt(record.input)
        return record, self._media.spelled(text, record.media) if self._media is not None else text

    def _check(self, row: int) -> str | None:
        record, text = self._read(row)
        tokens = self._tokens(self._prompt(row, record, text, "check"))
        if self._max_prompt_tokens is not None and tokens > self._max_prompt_tokens:
            raise BadRecord(f"the prompt has {tokens} tokens, more than max_prompt_tokens {self._max_prompt_tokens}")
        if self._context_tokens is not None and tokens > self._context_tokens:
            raise BadRecord(
                f"the prompt has {tokens} tokens, but the model's context leaves {self._context_tokens} beside "
                "max_new_tokens"
            )
        return record.label

    def _tokens(self, prompt: Prompt) -> int:
        """What the model sees of it."""
        if self._media is None:
            if prompt.media:
                raise BadRecord("it has images, audio or video, but the model reads text alone")
            return len(prompt.token_ids)
        try:
            return len(self._media.read(prompt).token_ids)
        except MediaError as error:
            raise BadRecord(str(error)) from error
