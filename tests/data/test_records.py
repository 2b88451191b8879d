from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrft.data import Source
from lightrft.data.placeholders import as_parts
from lightrft.data.records import BadRecord, read_record
from lightrft.samples import Media

USER = {"role": "user", "content": "hi"}


def read(raw: Any, folder: Path = Path(), **keys: Any) -> Any:
    return read_record(raw, Source("set.jsonl", **keys), folder)


@pytest.mark.parametrize(
    ("raw", "reference"),
    [
        ({"reference": "x"}, "x"),
        ({"reference": " 007 "}, " 007 "),
        ({"reference": 72}, "72"),
        ({"reference": 72.0}, "72"),
        ({"reference": 0.5}, "0.5"),
        ({"reference": 0}, "0"),
        ({"reference": None}, None),
        ({"reference": float("nan")}, None),
        ({}, None),
        ({"reward_model": {"ground_truth": 4, "style": "rule"}}, "4"),
        ({"ground_truth": "g"}, "g"),
        ({"reward_model": {"ground_truth": "inner"}, "ground_truth": "outer"}, "inner"),
        ({"reference": "own", "ground_truth": "outer"}, "own"),
        ({"reference": None, "ground_truth": "outer"}, "outer"),
    ],
)
def test_the_reference_is_text_from_its_key_or_the_fallbacks(raw: dict[str, Any], reference: str | None) -> None:
    assert read({"input": "q"} | raw).reference == reference


@pytest.mark.parametrize(
    ("raw", "keys", "label"),
    [
        ({"label": "own"}, {}, "own"),
        ({"extra_info": {"label": "inner"}}, {}, "inner"),
        ({"label": None, "extra_info": {"label": "inner"}}, {}, "inner"),
        ({"label": "own", "extra_info": {"label": "inner"}}, {}, "own"),
        ({"extra_info": {"kind": "inner"}}, {"label_key": "kind"}, "inner"),
        ({}, {}, None),
        ({"label": 3}, {"label": "rule"}, "rule"),
    ],
)
def test_the_label_is_from_its_key_extra_info_or_the_source(
    raw: dict[str, Any], keys: dict[str, Any], label: str | None
) -> None:
    assert read({"input": "q"} | raw, **keys).label == label


def test_dotted_keys_reach_into_objects_and_a_column_of_that_name_comes_first() -> None:
    raw = {"data": {"q": {"text": "deep"}}, "data.a": "flat", "data.b": 1}
    record = read(raw, input_key="data.q.text", reference_key="data.a")
    assert (record.input, record.reference) == ("deep", "flat")
    assert record.columns == {"data": {"q": {"text": "deep"}}, "data.b": 1}


def test_columns_are_what_nothing_else_came_from_in_types_a_checkpoint_takes(tmp_path: Path) -> None:
    raw: dict[str, Any] = {"input": "q", "reference": "r", "label": "l", "images": None, "videos": []}
    left = {"day": datetime.date(2020, 1, 2), "price": Decimal("1.50"), "level": {"x": (1, 2)}, "bytes": b"\x00\xff"}
    columns = read(raw | left).columns
    assert columns == {"day": "2020-01-02", "price": "1.50", "level": {"x": [1, 2]}, "bytes": b"\x00\xff"}
    torch.save(columns, tmp_path / "columns.pt")
    assert torch.load(tmp_path / "columns.pt", weights_only=True) == columns


def test_a_constant_label_leaves_the_column_of_that_name_to_the_record() -> None:
    assert read({"input": "q", "label": 3}, label="rule").columns == {"label": 3}


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Six boxes.\n#### 1,000", "1000"),
        ("#### -3 ", "-3"),
        ("a #### 1\n#### 1,234,567.50\n", "1234567.50"),
        ("####12", "12"),
    ],
)
def test_gsm8k_takes_what_follows_the_hash_marks_without_commas(answer: str, reference: str) -> None:
    record = read({"question": "How many?", "answer": answer}, format="gsm8k")
    assert (record.input, record.reference, record.columns) == ("How many?", reference, {})


@pytest.mark.parametrize("answer", ["no marks", "####", "#### , ", "", None, 5])
def test_gsm8k_without_an_answer_is_bad(answer: Any) -> None:
    with pytest.raises(BadRecord, match="'answer'"):
        read({"question": "How many?", "answer": answer}, format="gsm8k")


def test_messages_lose_keys_without_a_value_and_text_parts_become_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": parts, "tool_calls": None}]
    assert read({"input": messages}).input == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "ab"},
    ]


@pytest.mark.parametrize(
    ("raw", "keys", "says"),
    [
        ("text", {}, "it is a str, not an object"),
        ({"q": "x", "a": 1}, {}, "there is no key 'input'; the record has 'q', 'a'"),
        ({}, {}, "the record has no keys"),
        ({"input": "q"}, {"reference_key": "solution"}, "there is no key 'solution'; the record has 'input'"),
        ({"input": "q", "a": {"b": 1}}, {"reference_key": "a.c"}, "there is no key 'a.c'"),
        ({"input": "q", "a": "text"}, {"reference_key": "a.c"}, "there is no key 'a.c'"),
        ({"input": "q"}, {"label_key": "kind"}, "there is no key 'kind'"),
        ({"input": " \n"}, {}, "'input' is empty"),
        ({"input": 5}, {}, "'input' must be text or a list of messages, not 5"),
        ({"input": None}, {}, "not None"),
        ({"input": []}, {}, "non-empty list of messages"),
        ({"input": ["hi"]}, {}, "message 0 of 'input' must be an object with a role"),
        ({"input": [USER, {"role": "user"}]}, {}, "the content of message 1 of 'input' must be text"),
        ({"input": [{"role": "user", "content": " "}]}, {}, "message 0 of 'input' is empty"),
        ({"input": [{"role": "user", "content": []}]}, {}, "message 0 of 'input' is empty"),
        ({"input": [{"role": "user", "content": [{"type": "file"}]}]}, {}, "must be of type text, image"),
        ({"input": [USER, {"role": "assistant", "content": "ho"}]}, {}, "ends with the assistant's turn"),
        ({"input": "q", "reference": ["a", "b"]}, {}, "'reference' must be text or a number, not \\['a', 'b'\\]"),
        ({"input": "q", "label": 1}, {}, "'label' must name a reward recipe, not 1"),
        ({"input": "q" * 999, "reference": {"x": "y" * 999}}, {}, "'reference' must be .{0,150}$"),
    ],
)
def test_a_bad_record_says_what_is_wrong_and_what_is_there(raw: Any, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRecord, match=says):
        read(raw, **keys)


@pytest.mark.parametrize(
    ("text", "media", "says"),
    [
        ("<image> what?", {}, "the input has 1 <image> but 'images' holds 0"),
        ("what?", {"images": "data:,x"}, "the input has 0 <image> but 'images' holds 1"),
        ("<image><image>", {"images": ["data:,x"]}, "2 <image> but 'images' holds 1"),
        ("<audio>", {"videos": ["data:,x"]}, "1 <audio> but 'audios' holds 0"),
        ("<video>", {"videos": ["data:,x", b"y"]}, "1 <video> but 'videos' holds 2"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "1 <image> but 'images' holds 0"),
    ],
)
def test_placeholders_that_do_not_match_the_media_are_bad(text: Any, media: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRecord, match=says):
        read({"input": text} | media)


def test_placeholders_become_parts_with_the_text_between_them_and_nothing_else() -> None:
    assert as_parts("<image><image>a<video>", Media(images=("x", "y"))) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a<video>"}]}
    ]
    assert as_parts("<image>", Media()) == "<image>"


def test_a_kind_of_media_that_is_switched_off_is_ordinary_text() -> None:
    record = read({"input": "What does <video> do in HTML?", "videos": "x"}, media_keys={"videos": None})
    assert (record.media.videos, record.columns) == ((), {"videos": "x"})


def test_media_are_references_in_order_and_paths_beside_the_data_come_first(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    images = [
        "a.png",
        {"bytes": b"raw", "path": None},
        {"bytes": None, "path": str(tmp_path / "b.png")},
        "data:,x",
        b"y",
    ]
    raw = {"input": "<image>" * 5, "images": images}
    expected = (str(tmp_path / "a.png"), b"raw", str(tmp_path / "b.png"), "data:,x", b"y")
    assert read(raw, tmp_path).media.images == expected


@pytest.mark.parametrize("item", ["gone.png", "https://example.org/x.png", "a\x00b", "x" * 5000, "~nobody/x.png"])
def test_a_media_file_that_does_not_exist_is_bad(item: str, tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="of 'images' does not exist"):
        read({"input": "<image>", "images": item}, tmp_path)


@pytest.mark.parametrize("item", [5, None, b"", {"path": None}, {"array": [0.0]}])
def test_media_of_another_type_are_bad(item: Any) -> None:
    with pytest.raises(BadRecord, match="'audios' must hold paths, bytes or data URIs"):
        read({"input": "<audio>", "audios": [item]})


def test_record_values_are_left_as_they_were() -> None:
    raw: dict[str, Any] = {"input": [USER | {"name": None}], "extra": {"a": [1]}}
    before = json.dumps(raw)
    read(raw).columns["extra"]["a"].append(2)
    assert json.dumps(raw) == before
