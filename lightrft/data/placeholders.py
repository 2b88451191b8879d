"""``<image>``, ``<audio>`` and ``<video>`` in a prompt, and the media that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lightrft.samples import PART_OF, Media


def count(text: str | list[dict[str, Any]], part: str) -> int:
    """Placeholders of one kind (``image``) in text or messages, as text ``<image>`` or as parts of that type."""
    contents = [text] if isinstance(text, str) else [message["content"] for message in text]
    return sum(
        piece["text"].count(f"<{part}>") if piece["type"] == "text" else piece["type"] == part
        for content in contents
        for piece in _pieces(content)
    )


def shown(messages: list[dict[str, Any]], media: Media) -> Media:
    """Of the media of a conversation, those of its first messages."""
    return Media(**{kind: getattr(media, kind)[: count(messages, part)] for kind, part in PART_OF.items()})


def as_parts(text: str | list[dict[str, Any]], media: Media) -> str | list[dict[str, Any]]:
    """The input with placeholders as parts (``{"type": "image"}``), the form templates of multimodal models take.

    Input without media stays as it is, and so does the content of messages without placeholders.
    """
    parts = [part for kind, part in PART_OF.items() if getattr(media, kind)]
    if not parts:
        return text
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return [{**message, "content": _split(message["content"], parts)} for message in messages]


def _pieces(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _split(content: str | list[dict[str, Any]], parts: list[str]) -> str | list[dict[str, Any]]:
    pieces = [piece for whole in _pieces(content) for piece in _cut(whole, parts)]
    return content if pieces == _pieces(content) else pieces


def _cut(piece: Mapping[str, Any], parts: list[str]) -> Iterator[dict[str, Any]]:
    if piece["type"] != "text":
        yield dict(piece)
        return
    # A capturing split alternates: text, placeholder, text, ...
    for i, text in enumerate(re.split(f"<({'|'.join(parts)})>", piece["text"])):
        if i % 2:
            yield {"type": text}
        elif text:
            yield {"type": "text", "text": text}
