"""JSON and JSON Lines files as sequences of records, value for value as written.

Arrow would turn ``1`` beside ``2.5`` into ``1.0`` and ``"2020-01-02"`` into a timestamp; a reference must not change.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

_SPACE = b"\xef\xbb\xbf \t\r\n"
"""White space, and the byte order mark that a file may begin with."""


class JsonLines(Dataset):
    """The records of a JSON Lines file, parsed when asked for; only the lines' offsets are held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets = array("q")
        position = 0
        with path.open("rb") as file:
            for line in file:
                if line.strip(_SPACE):
                    self.offsets.append(position)
                position += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row: int) -> Any:
        """The value of the ``row``-th non-empty line.

        Raises:
            ValueError: the line is not JSON, or holds text that is not Unicode.
        """
        # Opened anew each time: worker processes must not share a file position.
        with self.path.open("rb") as file:
            file.seek(self.offsets[row])
            return _unicode(_parse(file.readline(), "the line"))


class JsonList(Dataset):
    """The records of a JSON file that is one list."""

    def __init__(self, path: Path) -> None:
        self.values = _parse(path.read_bytes(), str(path))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> Any:
        """The ``row``-th value.

        Raises:
            ValueError: it holds text that is not Unicode.
        """
        return _unicode(self.values[row])


def load_json(paths: Sequence[Path]) -> ConcatDataset:
    """Records of JSON files one after another; each file is a list of records, or one record a line.

    Raises:
        ValueError: a file that begins a list but is not JSON.
    """
    return ConcatDataset([JsonList(path) if _begins_list(path) else JsonLines(path) for path in paths])


def _begins_list(path: Path) -> bool:
    with path.open("rb") as file:
        first = next((line for line in file if line.strip(_SPACE)), b"")
    return first.strip(_SPACE).startswith(b"[")


def _parse(data: bytes, what: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error})") from error


def _unicode(value: Any) -> Any:
    # JSON can escape half a surrogate pair, which no tokenizer takes and no file can be written with.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise ValueError(f"its text is not Unicode ({error})") from error
    return value
