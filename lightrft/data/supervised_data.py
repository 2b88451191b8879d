"""Conversations for supervised fine-tuning under Lightning's own Trainer, with images and audio or without."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler

from lightrft.data.chat import Chat
from lightrft.data.records import OnBadRecord, warn_of_skipped
from lightrft.data.sources import SupervisedSource, sources_of
from lightrft.data.supervised_set import SupervisedBatch, SupervisedSet
from lightrft.media import MediaProcessor

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
