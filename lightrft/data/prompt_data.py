"""The prompts of a reinforcement learning run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

from lightrft.data.chat import Chat
from lightrft.data.prompt_set import PromptSet
from lightrft.data.records import OnBadRecord, warn_of_skipped
from lightrft.data.sources import PromptSource, Source, sources_of
from lightrft.data.stream import PromptStream
from lightrft.media import MediaProcessor
from lightrft.samples import Prompt


class PromptData(LightningDataModule):
    """Prompts to train and to evaluate on, from one or several sources.

    The constructor is cheap. :meth:`attach` tells it of the run, and :meth:`setup` then reads and checks *every*
    record, so that a run does not stop at hour three for a missing key.

    Args:
        train: sources of the prompts trained on; several are one pool, or blended when they give a probability.
        val: sources of the prompts evaluated on, each record once.
        system_prompt: put before the messages of every record; a record's own system message follows it.
        chat_template: apply the tokenizer's chat template; ``null`` does when it has one, ``false`` is raw text.
        max_prompt_tokens: longer prompts are bad records; images and audio count as what the model makes of them.
        on_bad_record: ``raise`` before training, or ``skip`` those records and warn with their number and the first
            three reasons.
        shuffle: draw the training prompts in random order, another one for each epoch and seed of the run.

    Attributes:
        bad_records: why records were skipped, each reason with ``source/row``.

    Raises:
        ValueError: two sources of one name, a blend in which not all sources give a probability, or a number out of
            range.
    """

    def __init__(
        self,
        train: list[Source] | Source | None = None,
        val: list[PromptSource] | PromptSource | None = None,
        system_prompt: str | None = None,
        chat_template: bool | None = None,
        max_prompt_tokens: int | None = None,
        on_bad_record: OnBadRecord = "raise",
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        self.train = sources_of(train, "train")
        self.val = sources_of(val, "val")
        self.system_prompt = system_prompt
        self.chat_template = chat_template
        self.max_prompt_tokens = max_prompt_tokens
        self.on_bad_record = on_bad_record
        self.shuffle = shuffle
        self.bad_records: list[str] = []
        self._probabilities = _probabilities(self.train)
        self._chat: Chat | None = None
        self._media: MediaProcessor | None = None
        self._seed, self._rank, self._world_size = 0, 0, 1
        self._context_tokens: int | None = None
        self._sets: dict[str, list[PromptSet]] = {}
        if any(getattr(source, "probability", None) is not None for source in self.val):
            raise ValueError("val sources are evaluated in full, not drawn; remove their probability.")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens is {max_prompt_tokens}; it must be at least 1.")

    def attach(
        self, processor: Any, seed: int = 0, rank: int = 0, world_size: int = 1, context_tokens: int | None = None
    ) -> None:
        """Tell of the run these prompts are for, before :meth:`setup`.

        Args:
            processor: ``PreTrainedTokenizerBase`` of the actor, or the ``ProcessorMixin`` around it, which reads the
                media of every record once.
            seed: the run's seed, of the order in which prompts are drawn.
            rank: which share of the prompts is this process's.
            world_size: number of shares.
            context_tokens: most tokens of a prompt that the model's context leaves room for; longer ones are bad
                records. ``None`` is no limit.

        Raises:
            ValueError: the tokenizer has no chat template but one is needed, or there is no room for a prompt.
        """
        self._chat = Chat.of(processor, self.chat_template, self.system_prompt)
        self._media = MediaProcessor.of(processor)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        if context_tokens is not None and context_tokens < 1:
            raise ValueError("sampling.max_new_tokens takes the model's whole context; lower it to leave room to ask.")
        self._context_tokens = context_tokens
        self._sets, self.bad_records = {}, []

    def setup(self, stage: str | None = None) -> None:
        """Load and check the records: all of them, or those of ``val`` alone for the stage ``validate``.

        Raises:
            RuntimeError: :meth:`attach` has not been called.
            FileNotFoundError: there are no such data.
            ValueError: records cannot be used; names the first three.
        """
        if self._chat is None:
            raise RuntimeError("PromptData.attach(processor, ...) must come before setup(); RFTTrainer calls it.")
        for part, sources in (("train", self.train), ("val", self.val)):
            if part not in self._sets and not (part == "train" and stage == "validate"):
                self._sets[part] = [self._load(source, self._chat) for source in sources]

    def labels(self) -> set[str | None]:
        """The reward recipes that the records ask for; ``None`` among them is the recipe ``default``."""
        return {label for sets in self._sets.values() for one in sets for label in one.labels}

    def train_dataloader(self) -> PromptStream:
        """The endless stream of training prompts, at its beginning.

        Raises:
            RuntimeError: there are no train sources, or :meth:`setup` has not been called.
        """
        sets = self._loaded("train")
        if not sets:
            raise RuntimeError("There is nothing to train on; give data.train a source.")
        return PromptStream(sets, self._probabilities, self._seed, self.shuffle, self._rank, self._world_size)

    def val_dataloader(self) -> list[Prompt]:
        """This rank's evaluation prompts: of all, in order, every ``world_size``-th from ``rank`` on.

        Prompt ``i`` of rank ``r`` is number ``i * world_size + r`` of all; ranks may have one prompt more than others.
        """
        everything = [(one, index) for one in self._loaded("val") for index in range(len(one))]
        return [one.prompt(index, "val") for one, index in everything[self._rank :: self._world_size]]

    def _load(self, source: PromptSource, chat: Chat) -> PromptSet:
        loaded = PromptSet(source, chat, self._media, self.max_prompt_tokens, self.on_bad_record, self._context_tokens)
        self.bad_records += loaded.bad_records
        if self._rank == 0:
            warn_of_skipped(source.name, loaded.bad_records)
        return loaded

    def _loaded(self, part: str) -> list[PromptSet]:
        if part not in self._sets:
            raise RuntimeError(f"PromptData.setup() must come before its {part} prompts are asked for.")
        return self._sets[part]


def _probabilities(sources: list[Source]) -> list[float] | None:
    given = [source.probability for source in sources if source.probability is not None]
    if not given:
        return None
    if len(given) < len(sources):
        missing = ", ".join(source.name for source in sources if source.probability is None)
        raise ValueError(f"Either all train sources give a probability or none does; {missing} gives none.")
    if len(sources) == 1:
        raise ValueError(
            f"{sources[0].name} is the only train source; its probability would have no effect, remove it."
        )
    return [probability / sum(given) for probability in given]
