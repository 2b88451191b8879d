"""Prompts with images and audio: how they are spelled, how long they are, and which records cannot be used."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from media_worlds import gif, media_world, png, wav
from PIL import Image

from lightrft.data import PromptData, Source
from lightrft.samples import Prompt

Write = Callable[..., str]


def uri(file: bytes) -> str:
    return f"data:;base64,{base64.b64encode(file).decode()}"


IMAGE, AUDIO = uri(png(0)), uri(wav(0))


def loaded(processor: Any, path: str, context_tokens: int | None = None, source: Any = None, **keys: Any) -> PromptData:
    data = PromptData(val=Source(path, **source or {}), **keys)
    data.attach(processor, context_tokens=context_tokens)
    data.setup("fit")
    return data


def prompts(processor: Any, path: str, *rest: Any, **keys: Any) -> list[Prompt]:
    return loaded(processor, path, *rest, **keys).val_dataloader()


def texts(processor: Any, path: str, *rest: Any, **keys: Any) -> list[str]:
    return [prompt.text for prompt in prompts(processor, path, *rest, **keys)]


# Spelling


def test_the_processors_template_comes_before_the_tokenizers(llava: Any, write: Write) -> None:
    path = write([{"input": "q <image>", "images": IMAGE}, {"input": "q"}])
    assert texts(llava, path) == ["(user)q <image><eos>\n(assistant)", "(user)q<eos>\n(assistant)"]
    llava.chat_template = None
    assert texts(llava, write([{"input": "q"}])) == ["[user]q<eos>\n[assistant]"]


@pytest.mark.parametrize("chat_template", [None, True, False])
def test_the_processors_template_too_can_be_switched_off(chat_template: bool | None, llava: Any, write: Write) -> None:
    expected = "q <image> " if chat_template is False else "(user)q <image> <eos>\n(assistant)"
    path = write([{"input": "q <image> ", "images": IMAGE}])
    assert texts(llava, path, chat_template=chat_template) == [expected]


def test_placeholders_become_the_parts_that_multimodal_templates_take(llava: Any, write: Write) -> None:
    parts = [{"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "!"}]
    messages = [
        {"role": "user", "content": "<image>first<image>"},
        {"role": "assistant", "content": "no media"},
        {"role": "user", "content": parts},
    ]
    images = [uri(png(number)) for number in range(3)]
    (prompt,) = prompts(llava, write([{"input": messages, "images": images}]))
    assert prompt.text == (
        "(user)<image>first<image><eos>\n(assistant)no media<eos>\n(user)and<image>!<eos>\n(assistant)"
    )
    assert (prompt.media.images, prompt.media.audios) == (tuple(images), ())


def test_a_placeholder_is_spelled_as_the_models_own(qwen2_audio: Any, write: Write) -> None:
    path = write([{"input": "hear <audio> or <image>", "audios": AUDIO}, {"input": "none"}])
    images_are_text = {"media_keys": {"images": None}}
    raw = prompts(qwen2_audio, path, source=images_are_text, chat_template=False)
    assert [prompt.text for prompt in raw] == ["hear <|AUDIO|> or <image>", "none"]
    assert (raw[0].token_ids == qwen2_audio.tokenizer.convert_tokens_to_ids("<|AUDIO|>")).sum() == 1
    assert texts(qwen2_audio, path, source=images_are_text) == [
        "(user)hear <|AUDIO|> or <image><eos>\n(assistant)",
        "(user)none<eos>\n(assistant)",
    ]


def test_relative_media_of_a_source_are_beside_its_file(llava: Any, write: Write, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(0))
    (prompt,) = prompts(llava, write([{"input": "<image>", "images": "x.png"}]))
    assert prompt.media.images == (str(tmp_path / "x.png"),)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="its processor needs torchvision")
def test_a_video_beside_its_file_is_a_part_and_counts_as_what_the_model_sees(write: Write, tmp_path: Path) -> None:
    (tmp_path / "film.gif").write_bytes(gif(0))
    processor = media_world("qwen2_5_vl").processor
    path = write([{"input": "[1]<video>", "videos": "film.gif"}], "set.jsonl")
    (prompt,) = prompts(processor, path, chat_template=False, max_prompt_tokens=1 + 8)
    assert prompt.media.videos == (str(tmp_path / "film.gif"),) and len(prompt.token_ids) == 2
    with pytest.raises(ValueError, match="the prompt has 9 tokens, more than max_prompt_tokens 8"):
        prompts(processor, path, chat_template=False, max_prompt_tokens=8)


# Length

RECORDS = {
    "llava": ({"input": "ab<image>", "images": IMAGE}, 2 + 16),
    "qwen2_audio": ({"input": "a<audio>", "audios": AUDIO}, 1 + 7),
}


@pytest.mark.parametrize("family", RECORDS)
def test_limits_are_of_the_tokens_that_the_model_sees(
    family: str, write: Write, request: pytest.FixtureRequest
) -> None:
    processor, (record, seen) = request.getfixturevalue(family), RECORDS[family]
    path = write([record], "set.jsonl")
    raw: dict[str, Any] = {"chat_template": False}
    (prompt,) = prompts(processor, path, seen, max_prompt_tokens=seen, **raw)
    assert len(prompt.token_ids) == len(record["input"].partition("<")[0]) + 1
    with pytest.raises(
        ValueError, match=f"set/0: the prompt has {seen} tokens, more than max_prompt_tokens {seen - 1}"
    ):
        prompts(processor, path, max_prompt_tokens=seen - 1, **raw)
    with pytest.raises(ValueError, match=f"set/0: the prompt has {seen} tokens, but .* leaves {seen - 1} beside"):
        prompts(processor, path, seen - 1, **raw)


# Bad records


def check_bad(processor: Any, write: Write, bad: Any, fine: Any, reason: str, **keys: Any) -> None:
    """The record stops the run by its name, or is skipped and counted."""
    path = write([fine, bad], "set.jsonl")
    with pytest.raises(ValueError, match=rf"1 of 2 records of 'set' cannot be used; .*set/1: {reason}"):
        loaded(processor, path, **keys)
    with pytest.warns(UserWarning, match=rf"Skipped 1 records of 'set'\. set/1: {reason}"):
        data = loaded(processor, path, on_bad_record="skip", **keys)
    assert [prompt.uid for prompt in data.val_dataloader()] == ["set/0@val"]
    assert len(data.bad_records) == 1


MISMATCHED: dict[str, tuple[dict[str, Any], str]] = {
    "an image too few": ({"input": "<image><image>", "images": IMAGE}, "the input has 2 <image> but 'images' holds 1"),
    "an image too many": ({"input": "<image>", "images": [IMAGE] * 2}, "the input has 1 <image> but 'images' holds 2"),
    "no image": ({"input": "see <image>"}, "the input has 1 <image> but 'images' holds 0"),
    "audio": ({"input": "<audio>", "audios": AUDIO}, ".*has 1 audios, but LlavaProcessor has no token for"),
    "video": ({"input": "<video>", "videos": IMAGE}, ".*has 1 videos, but LlavaProcessor has no token for"),
}


@pytest.mark.parametrize("case", MISMATCHED)
def test_media_that_do_not_fit_prompt_or_model_are_bad_records(case: str, llava: Any, write: Write) -> None:
    check_bad(llava, write, *[MISMATCHED[case][0], {"input": "<image>", "images": IMAGE}, MISMATCHED[case][1]])


def test_a_template_that_loses_an_image_makes_a_bad_record(llava: Any, write: Write) -> None:
    llava.chat_template = "{{ messages[0].content[0].text or messages[0].content }}"
    bad = {"input": "a<image>", "images": IMAGE}
    check_bad(llava, write, bad, {"input": "fine"}, ".*has 1 images, but 0 of the placeholders '<image>'")


def test_an_image_token_in_text_that_is_no_placeholder_is_a_bad_record(llava: Any, write: Write) -> None:
    switched_off = {"media_keys": {"images": None}}
    reason = ".*has 0 images, but 1 of the placeholders '<image>'"
    check_bad(llava, write, {"input": "<image>"}, {"input": "fine"}, reason, source=switched_off)


def test_media_for_a_model_of_text_are_bad_records(chat_tokenizer: Any, write: Write) -> None:
    for bad in ({"input": "<image>", "images": IMAGE}, {"input": "<audio>", "audios": AUDIO}):
        check_bad(
            chat_tokenizer, write, bad, {"input": "fine"}, "it has images, audio or video, but the model reads text"
        )


def files(folder: Path) -> list[tuple[str, str, str]]:
    """Kind of media, file and reason, for files that cannot be used."""
    (folder / "broken.png").write_bytes(png(0)[:40])
    (folder / "text.jpg").write_text("I am a photo.")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "long.wav").write_bytes(wav(0, 31))
    (folder / "cut.wav").write_bytes(wav(0)[:200])
    (folder / "claims.wav").write_bytes(wav(0)[:40] + b"\xff\xff\xff\xff" + wav(0)[44:])
    Image.new("RGB", (56, 56)).save(folder / "moves.gif", save_all=True, append_images=[Image.new("RGB", (56, 56), 1)])
    Image.new("RGB", (2, 900)).save(folder / "thin.png")
    Image.new("I;16", (56, 56)).save(folder / "deep.png")
    return [
        ("images", "broken.png", ".*image 0 .*broken.png'\\) cannot be used"),
        ("images", "text.jpg", ".*it is no image of a kind that is read"),
        ("images", "empty.png", ".*it is empty"),
        ("images", "folder.png", "the file 'folder.png' of 'images' is a folder, a pipe or a device"),
        ("images", "pipe.png", "the file 'pipe.png' of 'images' is a folder, a pipe or a device"),
        ("images", "gone.png", "the file 'gone.png' of 'images' does not exist"),
        ("images", "/dev/zero", "the file '/dev/zero' of 'images' is a folder, a pipe or a device"),
        ("images", "data:image/png;base64,!", ".*the data URI is not base64"),
        ("images", "moves.gif", ".*it has 2 frames"),
        ("images", "thin.png", ".*an aspect ratio above 200"),
        ("images", "deep.png", ".*deeper than 8 bits a channel"),
        ("audios", "long.wav", ".*it lasts 31.00 s, but \\d+ s are heard at most"),
        ("audios", "cut.wav", ".*audio 0 .*the file ends after"),
        ("audios", "claims.wav", ".*the file ends after 4800 of its 2147483647 samples"),
    ]


@pytest.mark.timeout(60)
def test_hostile_files_are_bad_records_with_their_reasons(
    write: Write, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cases = files(tmp_path)
    for kind, family in {"images": "llava", "audios": "qwen2_audio"}.items():
        own = [(file, reason) for of, file, reason in cases if of == kind]
        fine = {"input": f"<{kind[:-1]}>", kind: IMAGE if kind == "images" else AUDIO}
        path = write([fine | {kind: file} for file, _ in own] + [fine], "set.jsonl")
        processor = request.getfixturevalue(family)
        with pytest.raises(ValueError, match=rf"{len(own)} of {len(own) + 1} records of 'set' cannot be used"):
            loaded(processor, path)
        with pytest.warns(UserWarning, match=f"Skipped {len(own)} records of 'set'"):
            data = loaded(processor, path, on_bad_record="skip")
        assert [prompt.uid for prompt in data.val_dataloader()] == [f"set/{len(own)}@val"]
        for row, ((_, reason), said) in enumerate(zip(own, data.bad_records, strict=True)):
            assert re.match(f"set/{row}: {reason}", said)
