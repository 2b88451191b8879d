r"""The program of a worker process: compares answers with math-verify, one after another.

It is started by its path, not imported: it speaks over its own pipes, so the training script needs no ``__main__``
guard, and it never loads torch, so it starts fast and its memory can be held small.

Standard input brings JSON lines: first the settings, then lists of ``[reference, text, boxed]``. Standard output
answers one byte for each: ``r`` once (ready), then for every item ``1`` or ``0``, and ``x`` before a worker that has
grown too large leaves. The process that started it holds the time limit; what is here only makes sure that nothing
outlives that process.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

SECONDS_BETWEEN_CHECKS = 5.0


def main() -> None:
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent decides.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.dup(1)
    silence(1)
    lines = incoming(parent)
    settings = json.loads(next(lines))
    sys.path[:] = settings["path"]
    judge = load_judge()
    confine(settings["memory_bytes"])
    silence(2)
    os.write(replies, b"r")
    for line in lines:
        for reference, text, boxed in json.loads(line):
            # Twice the parent's limit, and the kernel ends us even inside one long operation that holds the GIL.
            signal.setitimer(signal.ITIMER_REAL, 2 * settings["seconds"] + 1)
            right = judge(reference, text, boxed)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(replies, b"1" if right else b"0")
            if peak_bytes() > settings["retire_bytes"]:
                # What one answer left in caches may not make a later, right answer run out of memory.
                os.write(replies, b"x")
                return


def incoming(parent: int) -> Iterator[bytes]:
    """Lines of standard input until it ends or the parent is gone.

    A process forked from the parent may hold the pipe open after the parent's death, so its id is looked at as well.
    """
    buffer = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], SECONDS_BETWEEN_CHECKS)[0]:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return
        *lines, buffer = (buffer + data).split(b"\n")
        yield from lines


def silence(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def confine(memory_bytes: int) -> None:
    """No more memory than this, no file written, no core dumped."""
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def peak_bytes() -> int:
    """Most memory that this program has held."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        # Not Linux, where this number would be that of the process which started us, a trainer of many gigabytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load_judge() -> Callable[[str, str, bool], bool]:
    logging.disable()
    sys.dont_write_bytecode = True
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    in_box = (LatexExtractionConfig(boxed_match_priority=0),)
    anywhere = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def read(text: str, config: tuple[Any, ...]) -> list[Any]:
        # No timeout of its own: that would take the alarm, and with it the one that ends this process.
        return list(parse(text, config, parsing_timeout=None))

    def judge(reference: str, text: str, boxed: bool) -> bool:
        """Whether the text is the reference (``boxed``), or the last expression in it is."""
        try:
            answer = read(f"\\boxed{{{text}}}", in_box) if boxed else read(text, anywhere)
            expected = read(f"\\boxed{{{reference}}}", in_box)
            return bool(verify(expected, answer, timeout_seconds=None))
        except Exception:  # MemoryError and RecursionError too: what cannot be read is not right.
            return False

    return judge


if __name__ == "__main__":
    main()
