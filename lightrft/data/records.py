"""From a raw record to what a prompt is made of; every error names the key, and what was found instead."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightrft.data.placeholders import count
from lightrft.data.sources import DataSource, PromptSource
from lightrft.samples import PART_OF, Media

OnBadRecord = Literal["raise", "skip"]
Message = dict[str, Any]
T = TypeVar("T")

_MISSING = object()


class BadRecord(ValueError):
    """A record that cannot be used; the message says why."""


@dataclass(frozen=True)
class Record:
    """A record, read.

    Attributes:
        input: text, or messages with ``role`` and ``content``.
        reference: the expected answer.
        label: name of the reward recipe.
        media: by reference, nothing decoded.
        columns: the columns that none of the above came from, as numbers, strings, bytes, lists and dicts.
    """

    input: str | list[Message]
    reference: str | None
    label: str | None
    media: Media
    columns: dict[str, Any]


def read_record(raw: Any, source: PromptSource, folder: Path = Path()) -> Record:
    """Read a raw record by the keys of its source; ``folder`` is where relative media paths are looked up first.

    Raises:
        BadRecord: a key is absent, a value has the wrong type, a media file is missing, or the placeholders do not
            match the media.
    """
    if not isinstance(raw, Mapping):
        raise BadRecord(f"it is a {type(raw).__name__}, not an object with keys")
    text: str | list[Message]
    reference: str | None
    if source.format == "gsm8k":
        text, reference = _gsm8k(raw)
        used = {"question", "answer"}
    else:
        text, reference = _input(raw, source.input_key), _reference(raw, source.reference_key)
        used = {source.input_key, source.reference_key}
    media = media_of(raw, text, source, folder)
    if source.label is None:
        used.add(source.label_key)
    used.update(source.keys_of_media.values())
    return Record(
        input=text,
        reference=reference,
        label=source.label if source.label is not None else _label(raw, source.label_key),
        media=media,
        columns={str(key): plain(value) for key, value in raw.items() if key not in used},
    )


def media_of(raw: Mapping[str, Any], text: str | list[Message], source: DataSource, folder: Path) -> Media:
    """The media of a raw record by reference, one for each placeholder of its text or messages.

    Raises:
        BadRecord: a media file is missing, or the placeholders do not match the media.
    """
    media = Media(**{kind: _media(raw, key, folder) for kind, key in source.keys_of_media.items()})
    for kind, key in source.keys_of_media.items():
        part, given = PART_OF[kind], len(getattr(media, kind))
        if (wanted := count(text, part)) != given:
            raise BadRecord(f"the input has {wanted} <{part}> but {key!r} holds {given}")
    return media


def screen(
    name: str, count: int, read: Callable[[int], T], on_bad_record: OnBadRecord
) -> tuple[dict[int, T], list[str]]:
    """Read rows ``0 .. count - 1``; what was read of the usable ones by row, and the reasons against the others.

    Raises:
        ValueError: some cannot be used and ``on_bad_record`` is ``raise``, or none can.
    """
    usable: dict[int, T] = {}
    reasons: list[str] = []
    for row in range(count):
        try:
            usable[row] = read(row)
        except BadRecord as error:
            reasons.append(f"{name}/{row}: {error}")
    if reasons and (on_bad_record == "raise" or not usable):
        cure = "; mend them, or leave them out with on_bad_record: skip" if usable else ""
        raise ValueError(f"{len(reasons)} of {count} records of {name!r} cannot be used{cure}. {_first_of(reasons)}")
    return usable, reasons


def warn_of_skipped(name: str, reasons: list[str]) -> None:
    """Warn with the number of skipped records and the first three reasons, if there are any."""
    if reasons:
        warnings.warn(f"Skipped {len(reasons)} records of {name!r}. {_first_of(reasons)}", stacklevel=3)


def lookup(record: Any, key: str) -> Any:
    """The value of a key, where a dotted key that is no column itself reaches into nested objects.

    Raises:
        BadRecord: the key is absent; names the keys there are.
    """
    if (value := _find(record, key)) is _MISSING:
        raise BadRecord(f"there is no key {key!r}; the record has {', '.join(map(repr, record)) or 'no keys'}")
    return value


def messages_of(value: Any, key: str) -> list[Message]:
    """Messages, checked: each an object with a ``role`` and a ``content`` of text or parts; ``None`` values left out.

    Raises:
        BadRecord: they are not; says which message.
    """
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{key!r} must be a non-empty list of messages, not {_short(value)}")
    return [_message(message, f"message {i} of {key!r}") for i, message in enumerate(value)]


def plain(value: Any) -> Any:
    """A value in types that go into checkpoints: numbers, strings, bytes, lists, dicts; dates become ISO text."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _first_of(reasons: list[str]) -> str:
    return "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else ".")


def _find(record: Any, key: str) -> Any:
    if key in record:
        return record[key]
    value = record
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _input(raw: Mapping[str, Any], key: str) -> str | list[Message]:
    value = lookup(raw, key)
    if isinstance(value, list):
        messages = messages_of(value, key)
        if messages[-1]["role"] == "assistant":
            raise BadRecord(f"{key!r} ends with the assistant's turn; a prompt ends before it")
        return messages
    return _text(value, key)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{key!r} must be text or a list of messages, not {_short(value)}")
    if not value.strip():
        raise BadRecord(f"{key!r} is empty")
    return value


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRecord(f"{where} must be an object with a role and a content, not {_short(message)}")
    # A table gives every message the keys of all; templates ask whether a key is there.
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return message | {"content": ""}
    if isinstance(content, list):
        return message | {"content": _parts(content, where)}
    if not isinstance(content, str):
        raise BadRecord(f"the content of {where} must be text or a list of parts, not {_short(content)}")
    if not content.strip() and message["role"] in ("user", "assistant") and not message.get("tool_calls"):
        raise BadRecord(f"the content of {where} is empty")
    return message


def _parts(content: list[Any], where: str) -> str | list[dict[str, Any]]:
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in PART_OF.values():
            parts.append({"type": kind})
        else:
            raise BadRecord(f"a part of {where} must be of type text, image, audio or video, not {_short(part)}")
    if not parts:
        raise BadRecord(f"the content of {where} is empty")
    # Templates of text models print a list as Python would.
    return "".join(part["text"] for part in parts) if all("text" in part for part in parts) else parts


def _reference(raw: Mapping[str, Any], key: str) -> str | None:
    if key != "reference":
        return _answer(lookup(raw, key), key)
    for candidate in (key, "reward_model.ground_truth", "ground_truth"):
        value = _find(raw, candidate)
        if value is not _MISSING and (answer := _answer(value, candidate)) is not None:
            return answer
    return None


def _answer(value: Any, key: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of integers with a gap is stored as floats
    if isinstance(value, (str, int, float)):
        return str(value)
    raise BadRecord(f"{key!r} must be text or a number, not {_short(value)}; a dotted key reaches into objects")


def _label(raw: Mapping[str, Any], key: str) -> str | None:
    found = [value for name in (key, f"extra_info.{key}") if (value := _find(raw, name)) is not _MISSING]
    if not found and key != "label":
        lookup(raw, key)
    value = next((value for value in found if value not in (None, "")), None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRecord(f"{key!r} must name a reward recipe, not {_short(value)}; label: NAME gives all records one")
    return value


def _gsm8k(raw: Mapping[str, Any]) -> tuple[str, str]:
    question, answer = _text(lookup(raw, "question"), "question"), _text(lookup(raw, "answer"), "answer")
    reference = answer.rpartition("####")[2].replace(",", "").strip() if "####" in answer else ""
    if not reference:
        raise BadRecord(f"'answer' has nothing after ####: {_short(answer)}")
    return question, reference


def _media(raw: Mapping[str, Any], key: str, folder: Path) -> tuple[str | bytes, ...]:
    value = _find(raw, key)
    if value is _MISSING or value is None or value == "":
        return ()
    items = value if isinstance(value, list) else [value]
    return tuple(_media_item(item, key, folder) for item in items)


def _media_item(item: Any, key: str, folder: Path) -> str | bytes:
    if isinstance(item, Mapping) and (item.get("bytes") or item.get("path")):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytes) and item:
        return item
    if not isinstance(item, str) or not item:
        raise BadRecord(f"{key!r} must hold paths, bytes or data URIs, not {_short(item)}")
    if item.startswith("data:"):
        return item
    reason = "does not exist"
    try:
        for path in (folder / Path(item).expanduser(), Path(item).expanduser()):
            if path.is_file():
                return os.fspath(path)
            if path.exists():
                reason = "is a folder, a pipe or a device"
    except (ValueError, OSError, RuntimeError):  # too long, a null byte, no such home: no path at all
        pass
    raise BadRecord(f"the file {_short(item)} of {key!r} {reason}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
