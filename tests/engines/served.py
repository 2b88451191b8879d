"""A vLLM server in a process of its own, started by the command that the docs give."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ranks import free_port

from .contract import World

ROOT = Path(__file__).parents[2]
ON_CPU = ("--no-enable-chunked-prefill",)


def section() -> str:
    """What docs/engines.md says of servers."""
    return (ROOT / "docs/engines.md").read_text().split("\n## A server elsewhere\n")[1].split("\n## ")[0]


def documented() -> tuple[dict[str, str], list[str]]:
    """Variables and words of the command in docs/engines.md."""
    (command,) = re.findall(r"```bash\n(.*?)```", section(), flags=re.DOTALL)
    words = shlex.split(command.replace("\\\n", ""))
    variables = dict(word.split("=", 1) for word in words if word.startswith("VLLM_"))
    return variables, words[len(variables) :]


class Server:
    """Serves ``world``'s model; the constructor returns when it answers."""

    def __init__(self, world: World, folder: Path, *options: str, **variables: str) -> None:
        world.config.architectures = [type(world.model).__name__]
        world.config.save_pretrained(folder)
        world.tokenizer.save_pretrained(folder)
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        wanted, words = documented()
        assert words[:3] == ["vllm", "serve", "MODEL"]
        changed = {"--host": "127.0.0.1", "--port": port, "--dtype": "float32"}
        rest = [changed.get(before, word) for before, word in itertools.pairwise(words[2:])]
        # Not by the script, which wants a distribution called vllm: the CPU's has another name.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [*command, *rest, "--enforce-eager", *options],
            env={**os.environ, **wanted, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "INFO", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        log: list[str] = []
        for line in self._output():
            log.append(line)
            if "Application startup complete" in line:
                threading.Thread(target=lambda: [None for _ in self._output()], daemon=True).start()
                return
        self.kill()
        raise AssertionError("".join(log[-40:]))

    def _output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(world: World, folder: Path, *options: str, **variables: str) -> Iterator[Server]:
    server = Server(world, folder, *options, **variables)
    try:
        yield server
    finally:
        server.kill()
