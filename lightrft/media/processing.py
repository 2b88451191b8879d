"""What a model's processor makes of a prompt's media: placeholder tokens and features, item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightrft.media.references import MediaError, audio, described, image
from lightrft.media.smallest import beep, blinking, square
from lightrft.media.video import metadata, video
from lightrft.samples import PART_OF, Media, MediaItem, Prompt, Reading
from lightrft.whereabouts import mark

Made = TypeVar("Made")

_FRAMES = 4  # that towers in use join, and their processors choose, at least
PER_TOKEN = "token_type_ids"
"""Ends the names of what a processor says of every token."""


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Ids, ascending, of the tokens for which a model of this ``transformers`` config sees an image, video or audio.

    They mean nothing in a response, which has no media: no engine samples them, and the trainer's log-probs are of a
    distribution without them.
    """
    names = (f"{part}_token_{what}" for part in PART_OF.values() for what in ("id", "index"))
    found = {getattr(config, name, None) for name in names}
    return tuple(sorted(index for index in found if isinstance(index, int)))


def stand_in(media: MediaProcessor | None, readings: Sequence[Reading | None], kinds: frozenset[str]) -> Reading | None:
    """The sequence that a micro-batch lacks, to be computed and not trained on: the least that a model takes.

    Args:
        media: reads them for the model; ``None`` where it reads text alone.
        readings: of the micro-batch's rows.
        kinds: of media, of each of which it must have some.

    Returns:
        ``None`` where nothing is missing, and there is a row at all.
    """
    missing = kinds.difference(*(one.kinds for one in readings if one is not None))
    if readings and not missing:
        return None
    return media.least(missing) if media is not None else Reading(_any_text())


class MediaProcessor:
    """Reads the media of prompts with one model's processor. Nothing is kept: what is read twice is decoded twice.

    Each item is processed by itself, as if it were the prompt's only one.

    Args:
        processor: ``ProcessorMixin`` of the model, with its tokenizer inside.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._name = type(processor).__name__
        self._least: dict[frozenset[str], Reading] = {}
        self._tokens: dict[str, Any] = {}
        self._ids: dict[str, int] = {}
        tokenizer = processor.tokenizer
        for kind, part in PART_OF.items():
            token: Any = getattr(processor, f"{part}_token", None)
            index = None if token is None else tokenizer.convert_tokens_to_ids(token)
            if part == "video" and getattr(processor, "video_processor", None) is None:
                continue
            if index is not None and index != tokenizer.unk_token_id:  # a processor may name one that is not there
                self._tokens[kind], self._ids[kind] = token, index
        # Around a placeholder that stands alone transformers 5.8 puts Qwen2-Audio's marks, which the text has already.
        marks = (getattr(processor, f"audio_{mark}_token", None) for mark in ("bos", "eos"))
        ids = [tokenizer.convert_tokens_to_ids(mark) for mark in marks if mark]
        self._marks = torch.tensor([index for index in ids if index is not None], dtype=torch.int64)

    @classmethod
    def of(cls, processor: Any) -> MediaProcessor | None:
        """For what a model's prompts are read with; ``None`` for a tokenizer alone, which reads text."""
        return cls(processor) if hasattr(processor, "tokenizer") else None

    @property
    def kinds(self) -> frozenset[str]:
        """Of media that are read, as :class:`~lightrft.samples.Media` names them."""
        return frozenset(self._ids)

    @property
    def apart(self) -> frozenset[str]:
        """Kinds that weights of their own see or hear: video is seen by those that see images."""
        return self.kinds - {"videos"} if "images" in self.kinds else self.kinds

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Tokens that stand for one item each; a prompt without media must have none of them."""
        return tuple(self._ids.values())

    def example(self, token_ids: Tensor, kinds: Iterable[str]) -> Prompt:
        """A prompt of these tokens and, after the first, one small item of each of the kinds.

        Not at the end: ``generate`` goes on from the position of a prompt's last token on each axis, which for an
        image's last one is not where the image ends.
        """
        kinds = sorted(kinds)
        placeholders = torch.tensor([self._ids[kind] for kind in kinds], dtype=torch.int64)
        media = Media(**{kind: (self._smallest(kind),) for kind in kinds})
        return Prompt("example", torch.cat([token_ids[:1], placeholders, token_ids[1:]]), text="", media=media)

    def _smallest(self, kind: str) -> bytes:
        if kind != "videos":
            return square() if kind == "images" else beep()
        wanted = [getattr(self._processor.video_processor, name, None) for name in ("num_frames", "min_frames")]
        return blinking(max(_FRAMES, *(number or 0 for number in wanted)))

    def least(self, kinds: frozenset[str]) -> Reading:
        """Of the shortest :meth:`example`; this one is kept, as updates ask for it again and again."""
        if kinds not in self._least:
            self._least[kinds] = self.read(self.example(_any_text(), kinds))
        return self._least[kinds]

    def spelled(self, text: str, media: Media) -> str:
        """Raw text with the model's own placeholders in place of ``<image>`` and ``<audio>``, of kinds it has."""
        for kind, part in PART_OF.items():
            if getattr(media, kind) and kind in self._tokens:
                text = text.replace(f"<{part}>", self._tokens[kind])
        return text

    def check(self, prompt: Prompt) -> None:
        """That every item has its placeholder, and that the model takes such items.

        Raises:
            MediaError: names the prompt.
        """
        for kind, part in PART_OF.items():
            given = len(getattr(prompt.media, kind))
            if given and kind not in self._tokens:
                raise MediaError(f"Prompt {prompt.uid!r} has {given} {kind}, but {self._name} has no token for them.")
            wanted = int((prompt.token_ids == self._ids[kind]).sum()) if kind in self._ids else 0
            if wanted != given:
                raise MediaError(
                    f"Prompt {prompt.uid!r} has {given} {kind}, but {wanted} of the placeholders "
                    f"{self._tokens[kind]!r}; token_ids must have one for each {part}, not expanded."
                )

    def decoded(self, prompt: Prompt) -> dict[str, list[Any]]:
        """``image``, ``audio`` and ``video`` to RGB ``PIL`` images, ``(float32 array [N], rate)`` and :func:`video`'s.

        Raises:
            MediaError: an item that cannot be read; names the prompt, the item and why.
        """
        found: dict[str, list[Any]] = {}
        for kind, one in self._each(prompt, self._decoded):
            found.setdefault(PART_OF[kind], []).append(one)
        return found

    def read(self, prompt: Prompt) -> Reading:
        """Decode and process a prompt's media, and expand their placeholders.

        Raises:
            MediaError: as :meth:`check`, or an item that cannot be read or that the processor refuses.
        """
        self.check(prompt)
        items: dict[str, list[MediaItem]] = {}
        for kind, item in self._each(prompt, self._item):
            items.setdefault(kind, []).append(item)
        if not items:
            return Reading(prompt.token_ids)
        pieces = list(self._pieces(prompt.token_ids, items))
        names = {name for piece in pieces for name in piece.token_types}
        zeros = [torch.zeros_like(piece.token_ids) for piece in pieces]
        types = {
            name: torch.cat([piece.token_types.get(name, zero) for piece, zero in zip(pieces, zeros)]) for name in names
        }
        ids = torch.cat([piece.token_ids for piece in pieces])
        found = [item for own in items.values() for item in own]
        self._check_order(prompt, [piece for piece in pieces if piece.kind in items], found)
        return Reading(ids, types, found)

    def expand(self, mask: Tensor, token_ids: Tensor, reading: Reading) -> Tensor:
        """What is said of a prompt's tokens, said of its reading's: ``False`` on what the items became.

        Args:
            mask: bool ``[P]``.
            token_ids: int64 ``[P]``, the prompt's.
            reading: what :meth:`read` made of it.

        Returns:
            bool ``[L]``.
        """
        counts, of_text = torch.ones_like(token_ids), torch.ones_like(mask)
        for kind, index in self._ids.items():
            sizes = [len(item.token_ids) for item in reading.items if item.kind == kind]
            counts[token_ids == index] = torch.tensor(sizes, dtype=counts.dtype)
            of_text[token_ids == index] = False
        return (mask & of_text).repeat_interleave(counts)

    def _check_order(self, prompt: Prompt, placed: list[MediaItem], joined: list[MediaItem]) -> None:
        """Features of one name are joined kind by kind, and must lie in the prompt in that order.

        Raises:
            MediaError: they do not; names the prompt.
        """
        for name in {name for item in joined for name in item.features}:
            if [item for item in placed if name in item.features] != [one for one in joined if name in one.features]:
                kinds = " before ".join(dict.fromkeys(item.kind for item in joined if name in item.features))
                raise MediaError(f"Prompt {prompt.uid!r}: {self._name} takes {kinds}, and not between them.")

    def _pieces(self, token_ids: Tensor, items: dict[str, list[MediaItem]]) -> Iterator[MediaItem]:
        """Items, each where its placeholder stands, and the text between them."""
        waiting = {self._ids[kind]: iter(own) for kind, own in items.items()}
        done = 0
        for at in torch.isin(token_ids, torch.tensor(list(waiting))).nonzero()[:, 0].tolist():
            yield MediaItem("text", token_ids[done:at], {}, {})
            yield next(waiting[int(token_ids[at])])
            done = at + 1
        yield MediaItem("text", token_ids[done:], {}, {})

    def _each(self, prompt: Prompt, make: Callable[[str, Any], Made]) -> Iterator[tuple[str, Made]]:
        for kind, part in PART_OF.items():
            for index, reference in enumerate(getattr(prompt.media, kind)):
                mark()  # a batch of videos takes long, and whoever waits for it must see that it goes on
                try:
                    made = make(kind, reference)
                except Exception as error:  # processors raise what they like
                    says = f"Prompt {prompt.uid!r}: {part} {index} ({described(reference)}) cannot be used: {error}"
                    raise (ImportError if isinstance(error, ImportError) else MediaError)(says) from error
                yield kind, made

    def _decoded(self, kind: str, reference: Any) -> Any:
        if kind == "images":
            return image(reference)
        if kind == "videos":
            return video(reference)
        heard = getattr(self._processor, "audio_processor", None) or self._processor.feature_extractor
        rate, longest = int(heard.sampling_rate), getattr(heard, "n_samples", None)
        # Whisper's extractor, Qwen2-Audio's too, cuts what is longer and does not say so.
        return audio(reference, rate, *([] if longest is None else [longest])).numpy(), rate

    def _item(self, kind: str, reference: Any) -> MediaItem:
        decoded = self._decoded(kind, reference)
        given = _ARGUMENTS[kind](decoded)
        with _in_float32():
            text = [self._tokens[kind]]
            made = dict(self._processor(text=text, add_special_tokens=False, return_tensors="pt", **given))
        token_ids = made.pop("input_ids")[0]
        token_ids = token_ids[~torch.isin(token_ids, self._marks)]
        if kind == "audios" and len(token_ids) < 2:
            # Of single tokens Qwen2-Audio thinks that they were not expanded, and puts in more.
            raise MediaError(f"{len(decoded[0])} samples are too short to be heard")
        made.pop("attention_mask", None)
        return MediaItem(
            kind=kind,
            token_ids=token_ids,
            token_types={name: made.pop(name)[0] for name in list(made) if name.endswith(PER_TOKEN)},
            features={name: tensor for name, tensor in made.items() if isinstance(tensor, Tensor)},
        )


# What a processor is called with, besides the text.
_ARGUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "images": lambda decoded: {"images": [decoded]},
    "audios": lambda decoded: {"audio": [decoded[0]], "sampling_rate": decoded[1]},
    # Processors choose among the frames, as they are configured.
    "videos": lambda decoded: {"videos": [decoded[0]], "video_metadata": [metadata(*decoded)]},
}


def _any_text() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


@contextmanager
def _in_float32() -> Iterator[None]:
    """As processors compute; inside a trainer's step new tensors may have its precision, which theirs do not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
