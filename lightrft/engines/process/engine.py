"""Any engine in a process of its own, with packages of its own."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightrft.engines.base import Engine, EngineError, WakePart
from lightrft.engines.buckets import packed
from lightrft.engines.group import EngineGroup
from lightrft.engines.process import names, shared_memory
from lightrft.engines.process.child import EngineProcess
from lightrft.engines.process.worker import Answer, Bucket, Call
from lightrft.ops.fingerprint import Fingerprint
from lightrft.samples import Prompt, Response, Sampling

_BUCKETS = 2  # one is filled while the other is emptied


class OwnProcess(Engine):
    """Runs an engine in a fresh interpreter on this machine (Linux); this object holds no model.

    For an engine whose packages contradict the trainer's, that would change the trainer's process, or that shall sample
    while the trainer computes. The process ends with this one, and everything that it started with it; Ctrl-C in a
    terminal does not reach it. Its environment variables are this process's, less those that make it a rank. Weights
    travel through host memory that both processes map, or on the CUDA device that both use; nothing goes over a
    network. Where its process dies or hangs, the call that is under way, or else the next one, raises
    :class:`~lightrft.engines.EngineError` with how it died and the last lines of its stderr; :meth:`start` begins anew.

    Args:
        engine: what runs there; pickled before it is started, so of a class that can be imported.
        python: the interpreter; ``None`` is this one.
        site: folder, or folders, that come first where it looks for packages. LightRFT is always this process's own; it
            needs torch and transformers there.
        timeout_seconds: longest wait without progress (tokens, scores, buckets of weights), start included; beyond it
            the process is killed.

    Attributes:
        bucket_bytes: of each of the two buckets through which weights go; they exist during a push.

    Raises:
        ValueError: an engine that has a process of its own or lies over several ranks, or a time of 0 or less.
    """

    in_own_process = True
    bucket_bytes: int = 256 << 20

    def __init__(
        self,
        engine: Engine,
        python: str | None = None,
        site: list[str] | str | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        if engine.in_own_process:
            raise ValueError(f"OwnProcess's engine is {type(engine).__name__}, which has a process of its own already.")
        if engine.tensor_parallel_size != 1:
            raise ValueError(
                f"{type(engine).__name__}'s tensor_parallel_size is {engine.tensor_parallel_size}, but OwnProcess "
                "serves one rank; set it to 1."
            )
        if not timeout_seconds > 0:
            raise ValueError(f"OwnProcess's timeout_seconds is {timeout_seconds}; it must be above 0.")
        self.engine = engine
        self.python = python
        self.site = [site] if isinstance(site, str) else list(site or [])
        self.timeout_seconds = timeout_seconds
        self._process: EngineProcess | None = None
        self._closed = False
        self._dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        return self.engine.dtype if self._process is None else self._dtype

    @property
    def running(self) -> bool:
        """Whether it is started and, as far as its calls have shown, alive."""
        return self._process is not None and self._process.epitaph is None

    def start(self, config: Any, tokenizer: Any, device: torch.device, group: EngineGroup | None = None) -> None:
        if self.running:
            raise EngineError("OwnProcess is started; close it before it starts anew.")
        if group is not None and group.size > 1:
            raise EngineError(f"OwnProcess was started on a group of {group.size} ranks, but serves one rank.")
        self._device = torch.device(device)
        process = EngineProcess(self.python or sys.executable, self._site_folders(), self.timeout_seconds)
        try:
            with process.conversation("start"):
                _save(config, tokenizer, process.folder)
                if self.python or self.site:  # its transformers may not be this one
                    names.written(config, process.folder / "names.json")
                answer = process.ask("start", _pickled(self.engine), self._device, torch.get_num_threads())
            self.in_float8, self.dropped = self._result(answer)
        except ImportError as error:
            process.end()
            raise EngineError(
                f"The engine's process cannot start: {error}. It runs {self.python or sys.executable} with the folders "
                f"{self.site} first; install what the engine needs there (extra `vllm` or `sglang` of lightning-rft), "
                "or name the interpreter or folder that has it in OwnProcess's python or site."
            ) from error
        except BaseException:
            process.end()
            raise
        self._process, self._closed = process, False

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        return self._call("generate", list(prompts), sampling, [list(own) for own in seeds])

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        return self._call("score", list(sequences))

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._push("update_weights", (), tensors, version)

    def update_adapter(self, scaling: float, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._push("update_adapter", (scaling,), tensors, version)

    def fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        return self._call("fingerprint", list(names))

    def sleep(self, level: int = 1) -> None:
        self._call("sleep", level)

    def wake(self, parts: Sequence[WakePart] = ("weights", "cache")) -> None:
        self._call("wake", tuple(parts))

    def close(self) -> None:
        """As every engine's; a call under way in another thread raises :class:`~lightrft.engines.EngineError`."""
        process, self._process, self._closed = self._process, None, True
        self.weight_version = -1
        if process is not None and (answer := process.end()) is not None and answer.failure is not None:
            raise answer.failure.error()

    def _site_folders(self) -> list[str]:
        missing = [folder for folder in self.site if not Path(folder).is_dir()]
        if missing:
            raise EngineError(f"OwnProcess's site {missing[0]!r} is no folder on this machine.")
        return [str(Path(folder).absolute()) for folder in self.site]

    def _push(self, method: str, first: tuple[Any, ...], tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        size = _BUCKETS * self.bucket_bytes
        with (
            self._conversation(method) as process,
            shared_memory.given(size, self._device, process.shared) as (memory, key),
        ):
            process.send(Call("push", (method, first, version, size, key, _BUCKETS)))
            answer, broken = _stream(tensors, memory.chunk(_BUCKETS), process)
        self._result(answer, broken)

    def _call(self, method: str, *arguments: Any) -> Any:
        with self._conversation(method) as process:
            answer = process.ask(method, *arguments)
        return self._result(answer)

    @contextmanager
    def _conversation(self, method: str) -> Iterator[EngineProcess]:
        process = self._process
        if process is None:
            raise EngineError(
                "OwnProcess is closed; start() it anew." if self._closed else "Call start() on the engine first."
            )
        process.timeout_seconds = self.timeout_seconds
        try:
            with process.conversation(method):
                yield process
        except BaseException:
            self.weight_version = -1  # they went with the process
            raise

    def _result(self, answer: Answer, broken: BaseException | None = None) -> Any:
        """What the engine returned; raises what it raised, or before that what broke the call off here."""
        self._dtype, self.weight_version = answer.dtype, answer.weight_version
        if broken is not None:
            raise broken
        if answer.failure is not None:
            raise answer.failure.error()
        return answer.result


def _pickled(engine: Engine) -> bytes:
    if type(engine).__module__ == "__main__":
        raise EngineError(
            f"{type(engine).__name__} is of the script itself; put it into a module that can be imported."
        )
    return pickle.dumps(engine)


def _save(config: Any, tokenizer: Any, folder: Path) -> None:
    """By files rather than pickled: the process may have another version of transformers, with other classes."""
    (folder / "config").mkdir()
    # All of it: what another version takes for the default is another matter.
    config.to_json_file(folder / "config" / "config.json", use_diff=False)
    tokenizer.save_pretrained(folder / "tokenizer")


def _stream(
    tensors: Iterable[tuple[str, Tensor]], buckets: Sequence[Tensor], process: EngineProcess
) -> tuple[Answer, BaseException | None]:
    """Send all tensors; the answer, and what the source of the tensors raised."""
    filled = packed(tensors, buckets)
    full, broken = 0, None
    while True:
        try:
            pieces = next(filled, None)
        except BaseException as error:
            pieces, broken = None, error
        shared_memory.settle(buckets[0])
        process.send(Bucket(pieces, broken=broken is not None))
        full += 1
        if pieces is None:
            break
        if full == len(buckets):
            answer = process.receive()
            if isinstance(answer, Answer):  # it wants no more
                return answer, None
            full -= 1
    while not isinstance(answer := process.receive(), Answer):
        pass
    return answer, broken
