"""Supervised records with images and audio: what is learned of them, how long they are, and which cannot be used."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from media_worlds import png, wav
from torch import Tensor
from transformers import AutoProcessor

from lightrft.data import SupervisedBatch, SupervisedData, SupervisedSource
from lightrft.media import MediaError, MediaProcessor
from lightrft.samples import Media, Prompt, Reading

Write = Callable[..., str]


def uri(file: bytes) -> str:
    return f"data:;base64,{base64.b64encode(file).decode()}"


IMAGE, OTHER, AUDIO = uri(png(0)), uri(png(1)), uri(wav(0))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], str]:
    """Write a processor to a folder, from which the data read it; returns its path."""

    def save(processor: Any) -> str:
        processor.save_pretrained(tmp_path / "processor")
        return str(tmp_path / "processor")

    return save


def batches(processor: str, path: str, source: Any = None, **keys: Any) -> list[SupervisedBatch]:
    """All sequences in order of the records, of which there are few."""
    data = SupervisedData(val=SupervisedSource(path, **source or {}), tokenizer=processor, **keys)
    data.setup("validate")
    return list(data.val_dataloader())


def sequences(processor: Any, loaded: list[SupervisedBatch]) -> list[tuple[str, list[str]]]:
    """Text of each sequence, runs of placeholders shortened to their number, and its learned stretches."""
    found = []
    for batch in loaded:
        for ids, mask, reading in zip(batch.sequences, batch.loss_masks, batch.readings):
            assert (ids.dtype, mask.dtype, ids.shape) == (torch.int64, torch.bool, mask.shape)
            assert reading is None or torch.equal(reading.token_ids, ids)
            pieces = [processor.tokenizer.decode([i]) for i in ids]
            learned = "".join(piece if m else "\0" for piece, m in zip(pieces, mask)).split("\0")
            found.append((shortened(pieces), [stretch for stretch in learned if stretch]))
    return found


def shortened(pieces: list[str]) -> str:
    for mark in ("<image>", "<|AUDIO|>"):
        for count in range(20, 0, -1):
            text = "\0".join(pieces).replace("\0".join([mark] * count), f"{{{count}}}")
            pieces = text.split("\0")
    return "".join(pieces)


# What is learned


def test_only_the_assistants_text_is_learned_and_never_a_placeholder(llava: Any, saved: Any, write: Write) -> None:
    parts = [{"type": "text", "text": "and"}, {"type": "image"}]
    messages = [
        {"role": "user", "content": "a<image>?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "as<image>this"},
        {"role": "user", "content": "<image>"},
    ]
    path = write([{"messages": messages, "images": [IMAGE, OTHER, IMAGE, OTHER]}, {"prompt": "q", "response": "r"}])
    folder = saved(llava)
    loaded = batches(folder, path)
    assert sequences(llava, loaded) == [
        (
            "(user)a{16}?<eos>\n(assistant)one<eos>\n(user)and{16}<eos>\n(assistant)as{16}this<eos>\n",
            ["one<eos>", "as", "this<eos>"],
        ),
        ("(user)q<eos>\n(assistant)r<eos>\n", ["r<eos>"]),
    ]
    first, second = loaded[0].readings
    assert first is not None and second is None
    shown = (IMAGE, OTHER, IMAGE)  # and none for the last turn, which nothing answers
    expected = [item for one in shown for item in reading_of(AutoProcessor.from_pretrained(folder), one).items]
    assert [item.kind for item in first.items] == ["images"] * 3
    for item, alone in zip(first.items, expected):
        assert torch.equal(item.features["pixel_values"], alone.features["pixel_values"])


def reading_of(processor: Any, image: str) -> Reading:
    ids = torch.tensor(processor.tokenizer("<image>")["input_ids"])
    return MediaProcessor(processor).read(Prompt("alone", ids, "", media=Media(images=(image,))))


def test_each_sequence_of_a_rewritten_conversation_has_its_own_images(llava: Any, saved: Any, write: Write) -> None:
    llava.chat_template = llava.chat_template.replace(
        "({{ message.role }})", "({{ message.role }}){% if loop.last and message.role == 'assistant' %}!{% endif %}"
    )
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}] * 2
    loaded = batches(saved(llava), write([{"messages": turns, "images": [IMAGE, OTHER]}]))
    assert [text for text, _ in sequences(llava, loaded)] == [
        "(user){16}<eos>\n(assistant)!a<eos>\n",
        "(user){16}<eos>\n(assistant)a<eos>\n(user){16}<eos>\n(assistant)!a<eos>\n",
    ]
    assert [len(one.items) for one in loaded[0].readings if one is not None] == [1, 2]


def test_raw_records_have_the_models_own_placeholder(qwen2_audio: Any, saved: Any, write: Write) -> None:
    path = write([{"prompt": "hear <audio>?", "response": "yes", "sounds": AUDIO}])
    loaded = batches(saved(qwen2_audio), path, {"media_keys": {"audios": "sounds"}}, chat_template=False)
    assert sequences(qwen2_audio, loaded) == [("hear {7}?yes<eos>", ["yes<eos>"])]


def test_limits_are_of_the_tokens_that_the_model_sees(llava: Any, saved: Any, write: Write) -> None:
    folder, path = saved(llava), write([{"prompt": "ab<image>", "response": "c", "images": IMAGE}], "set.jsonl")
    keys: dict[str, Any] = {"chat_template": False}
    assert len(batches(folder, path, max_tokens=20, **keys)[0].sequences[0]) == 2 + 16 + 2
    with pytest.raises(ValueError, match="set/0: it has 20 tokens, more than max_tokens 19"):
        batches(folder, path, max_tokens=19, **keys)


# When media are read


@contextmanager
def at(path: Path, file: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(file)
    yield
    path.write_bytes(before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_media_are_read_at_setup_and_again_for_every_batch(
    num_workers: int, llava: Any, saved: Any, write: Write, tmp_path: Path
) -> None:
    def pixels() -> Tensor:
        (batch,) = data.val_dataloader()
        return batch.readings[0].items[0].features["pixel_values"]

    image = tmp_path / "x.png"
    image.write_bytes(png(0))
    path = write([{"prompt": "<image>", "response": "r", "images": "x.png"}], "set.jsonl")
    data = SupervisedData(val=SupervisedSource(path), tokenizer=saved(llava), num_workers=num_workers)
    data.setup("validate")
    before = pixels()
    with at(image, png(1)):
        assert not torch.equal(pixels(), before)
    with at(image, b"broken"), pytest.raises(MediaError, match=r"'set/0': image 0 \(.*x\.png'\) cannot be used"):
        pixels()
    assert torch.equal(pixels(), before)


# Bad records

FINE = {"prompt": "<image>", "response": "r", "images": IMAGE}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an image too few": (FINE | {"prompt": "<image><image>"}, "the input has 2 <image> but 'images' holds 1"),
    "an image too many": (FINE | {"images": [IMAGE] * 2}, "the input has 1 <image> but 'images' holds 2"),
    "a part without image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "r"}]},
        "the input has 1 <image> but 'images' holds 0",
    ),
    "one that is not there": (FINE | {"images": "gone.png"}, "the file 'gone.png' of 'images' does not exist"),
    "one that is none": (FINE | {"images": "data:,none"}, ".*image 0 .*cannot be used"),
    "audio": (
        FINE | {"prompt": "<audio><image>", "audios": AUDIO},
        ".*has 1 audios, .*LlavaProcessor has no token for",
    ),
}


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_bad_media_are_bad_records(case: str, chat_template: bool, llava: Any, saved: Any, write: Write) -> None:
    record, reason = BAD[case]
    folder, path = saved(llava), write([FINE, record], "set.jsonl")
    keys: dict[str, Any] = {"chat_template": chat_template}
    with pytest.raises(ValueError, match=rf"1 of 2 records of 'set' cannot be used; .*set/1: {reason}"):
        batches(folder, path, **keys)
    with pytest.warns(UserWarning, match=rf"Skipped 1 records of 'set'\. set/1: {reason}"):
        assert [len(batch) for batch in batches(folder, path, on_bad_record="skip", **keys)] == [1]


def test_a_template_that_loses_an_image_makes_a_bad_record(llava: Any, saved: Any, write: Write) -> None:
    llava.chat_template = llava.chat_template.replace("{% elif part.type == 'image' %}<image>", "")
    with pytest.raises(ValueError, match=r"set/0: .*has 1 images, but 0 of the placeholders '<image>'"):
        batches(saved(llava), write([FINE], "set.jsonl"))


def test_a_batch_moves_with_its_readings(llava: Any) -> None:
    ids = torch.tensor([1, 2])
    batch = SupervisedBatch([ids] * 2, [ids > 1] * 2, readings=[reading_of(llava, IMAGE), None])
    first, second = batch.to(torch.device("meta")).readings
    assert first is not None and first.items[0].features["pixel_values"].is_meta and second is None
