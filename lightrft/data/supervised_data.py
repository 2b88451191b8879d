"""Conversations for supervised fine-tuning under Lightning's own Trainer, with images and audio or without."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler

from lightrft.data.chat import Chat
from lightrft.data.placeholders import as_parts, shown
from lightrft.data.records import (
    BadRecord,
    Message,
    OnBadRecord,
    lookup,
    media_of,
    messages_of,
    screen,
    warn_of_skipped,
)
from lightrft.data.sources import SupervisedSource, sources_of
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


_PARTS: dict[str | None, tuple[str, ...]] = {
    None: ("train", "val", "test"),
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


class SupervisedData(LightningDataModule):
    """Conversations to learn, for Lightning's own Trainer; the loss is on the assistant's tokens only.

    Args:
        train: sources of the conversations learned; several are one pool.
        val: sources of the conversations evaluated on while training.
        test: sources for the commands ``test`` and ``predict``.
        batch_size: sequences of a batch, on each device, as in any DataLoader; a batch is one optimizer step.
        tokens_per_microbatch: most tokens of one forward; the step splits its batch by it, which changes no gradient.
        max_tokens: longer sequences are bad records; none is cut, since a cut one would teach never to end.
        tokenizer: hub id or folder of the tokenizer, or of the processor around it, with which images and audio are
            read; ``null`` takes the module's ``processor`` or ``tokenizer``.
        chat_template: apply the tokenizer's chat template, ``prompt`` and ``response`` then being turns; ``null`` does
            when it has one, ``false`` joins prompt, response and the end of sequence token as raw text.
        on_bad_record: ``raise`` before training, or ``skip`` those records and warn with their number and the first
            three reasons.
        num_workers: processes that tokenize and read media; 0 is the training process itself.
        seed: seed of the order, which depends on it and the epoch alone; ``null`` takes that of ``seed_everything``.

    Attributes:
        bad_records: why records were skipped, each reason with ``source/row``.

    Raises:
        ValueError: two sources of one name, or a number out of range.
    """

    def __init__(
        self,
        train: list[SupervisedSource] | SupervisedSource | None = None,
        val: list[SupervisedSource] | SupervisedSource | None = None,
        test: list[SupervisedSource] | SupervisedSource | None = None,
        batch_size: int = 8,
        tokens_per_microbatch: int = 16384,
        max_tokens: int | None = None,
        tokenizer: str | None = None,
        chat_template: bool | None = None,
        on_bad_record: OnBadRecord = "raise",
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.train = sources_of(train, "train")
        self.val = sources_of(val, "val")
        self.test = sources_of(test, "test")
        self.batch_size = batch_size
        self.tokens_per_microbatch = tokens_per_microbatch
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.on_bad_record = on_bad_record
        self.num_workers = num_workers
        self.seed = seed
        self.bad_records: list[str] = []
        self._sets: dict[str, list[SupervisedSet]] = {}
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("tokens_per_microbatch", tokens_per_microbatch, 1),
            ("max_tokens", max_tokens, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{key} is {value}; it must be at least {least}.")

    def setup(self, stage: str | None = None) -> None:
        """Load and check the records that the stage needs; ``None`` is all.

        Raises:
            RuntimeError: there is no tokenizer.
            FileNotFoundError: there are no such data.
            ValueError: records cannot be used; names the first three.
        """
        for part in _PARTS[stage]:
            if part not in self._sets:
                self._sets[part] = [self._load(source) for source in getattr(self, part)]

    def train_dataloader(self) -> DataLoader:
        """Batches in random order, another one each epoch; each rank gets its share.

        Raises:
            RuntimeError: there are no train sources, or :meth:`setup` has not been called.
        """
        data = self._loaded("train")
        if not len(data):
            raise RuntimeError("There is nothing to train on; give data.train a source.")
        ranks = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        # Our own sampler, also on one device: the order then follows (seed, epoch), whatever else drew random numbers.
        return self._loader(data, DistributedSampler(data, num_replicas=ranks, rank=rank, seed=seed))

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Batches in order; Lightning gives each rank its share. No loader without val sources."""
        data = self._loaded("val")
        return self._loader(data) if len(data) else []

    def test_dataloader(self) -> DataLoader:
        """Batches of the test sources, in order.

        Raises:
            RuntimeError: there are no test sources, or :meth:`setup` has not been called.
        """
        data = self._loaded("test")
        if not len(data):
            raise RuntimeError("There is nothing to test on or to predict; give data.test a source.")
        return self._loader(data)

    def predict_dataloader(self) -> DataLoader:
        """As :meth:`test_dataloader`."""
        return self.test_dataloader()

    def _load(self, source: SupervisedSource) -> SupervisedSet:
        processor = self._processor()
        chat, media = Chat.of(processor, self.chat_template), MediaProcessor.of(processor)
        loaded = SupervisedSet(source, chat, media, self.max_tokens, self.on_bad_record)
        self.bad_records += loaded.bad_records
        if self.trainer is None or self.trainer.is_global_zero:
            warn_of_skipped(source.name, loaded.bad_records)
        return loaded

    def _processor(self) -> Any:
        if self.tokenizer is not None:
            from transformers import AutoProcessor

            return AutoProcessor.from_pretrained(self.tokenizer)  # a tokenizer, where there is nothing around it
        module = self.trainer and self.trainer.lightning_module
        found = getattr(module, "processor", None) or getattr(module, "tokenizer", None)
        if found is None:
            raise RuntimeError("There is no tokenizer: set data.tokenizer, or train a module that has one.")
        return found

    def _loader(self, data: Dataset, sampler: DistributedSampler | None = None) -> DataLoader:
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=partial(SupervisedBatch.collate, tokens_per_microbatch=self.tokens_per_microbatch),
        )

    def _loaded(self, part: str) -> Any:
        if part not in self._sets:
            raise RuntimeError(f"SupervisedData.setup() must come before its {part} batches are asked for.")
        return ConcatDataset(self._sets[part]) if self._sets[part] else []
