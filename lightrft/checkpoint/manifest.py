"""``checkpoint.json``: the files of a checkpoint with their sizes and checksums. Its presence makes a folder one."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NAME = "checkpoint.json"
PARTIAL = ".partial-"
_CHUNK = 2**22

Sums = dict[str, tuple[int, int]]
"""Bytes and CRC-32 of files, by their path in the folder."""


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a complete checkpoint."""
    return (folder / NAME).is_file() and not folder.name.startswith(PARTIAL)


def rank_file(rank: int) -> str:
    """Where the loop's state of a rank lies."""
    return f"rank-{rank}.pt"


def sums_of(folder: Path, files: Iterable[Path]) -> Sums:
    """Sizes and checksums of ``files``, as they are read back now."""
    return {file.relative_to(folder).as_posix(): _sum(file) for file in files}


def text_of(sums: Sums) -> str:
    """What ``checkpoint.json`` says."""
    files = {path: {"bytes": size, "crc32": crc} for path, (size, crc) in sorted(sums.items())}
    return json.dumps({"format": 1, "files": files}, indent=1) + "\n"


def listed(folder: Path) -> Sums:
    """The files of a checkpoint.

    Raises:
        ValueError: ``checkpoint.json`` cannot be read.
    """
    try:
        known = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
        return {path: (int(file["bytes"]), int(file["crc32"])) for path, file in known.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / NAME} is damaged ({error}); resume from another checkpoint.") from error


def ranks_of(sums: Sums) -> int:
    """On how many ranks the checkpoint was written."""
    return sum(bool(re.fullmatch(r"rank-\d+\.pt", path)) for path in sums)


def verify(
    folder: Path, rank: int = 0, ranks: int = 1, everyone: Callable[[Any], list[Any]] = lambda found: [found]
) -> Sums:
    """Read every file once, each rank its share, and compare: a flipped bit would be read as a wrong number.

    Args:
        folder: a checkpoint.
        rank, ranks: which share is this process's.
        everyone: what every rank gives, in a list; collective.

    Returns:
        the files.

    Raises:
        ValueError: a file is missing, cut short or changed; on every rank.
    """
    sums = listed(folder)
    in_order = sorted(sums, key=lambda path: -sums[path][0])
    faults = [fault for path in in_order[rank::ranks] if (fault := _fault(folder / path, *sums[path]))]
    for found in everyone(faults):
        if found:
            raise ValueError(f"{found[0]}; resume from another checkpoint.")
    return sums


def _fault(file: Path, size: int, crc: int) -> str | None:
    try:
        found = _sum(file)
    except OSError as error:
        return f"{file} is damaged ({error})"
    if found == (size, crc):
        return None
    how = f"{found[0]} bytes of {size}" if found[0] != size else "its content is not what was written"
    return f"{file} is damaged ({how})"


def _sum(file: Path) -> tuple[int, int]:
    size = crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
