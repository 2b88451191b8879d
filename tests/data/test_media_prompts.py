"""Prompts with images and audio: how they are spelled, how long they are, and which records cannot be used."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines.media_worlds import png, wav

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
    "audio": ({"input": "<audio>", "audios": AUDIO}, ".*has 1 audios, .* no audios: LlavaProcessor has no token for"),
    "video": ({"input": "<video>", "videos": IMAGE}, ".*has 1 videos, but LightRFT reads no video yet"),
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
