r"""The answer a response puts in ``\boxed{}``. Pure text scanning, linear in the text, safe on hostile input."""

from __future__ import annotations

import re
from typing import NamedTuple

LONGEST_ANSWER = 2048
r"""Characters. No honest answer is longer, and what is shorter cannot nest deep enough to hurt a parser."""

_OPENING = re.compile(r"\\boxed\s{0,8}\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


class Boxed(NamedTuple):
    r"""A ``\boxed{content}``, its command starting at character ``start`` of the text."""

    start: int
    content: str


def last_boxed(text: str) -> Boxed | None:
    r"""The last ``\boxed{...}`` of a text, innermost if nested; ``\{`` and ``\}`` are not braces.

    Returns:
        ``None`` where there is none, where the last one is never closed (a response cut off there has not answered;
        an earlier box is not its answer), or where it holds more than :data:`LONGEST_ANSWER` characters.
    """
    start = len(text)
    while (start := text.rfind(r"\boxed", 0, start)) >= 0:
        if opening := _OPENING.match(text, start):
            return _closed(text, start, opening.end())
    return None


def _closed(text: str, start: int, inside: int) -> Boxed | None:
    depth = 1
    for brace in _BRACE.finditer(text, inside, inside + LONGEST_ANSWER + 1):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return Boxed(start, text[inside : brace.start()])
    return None
