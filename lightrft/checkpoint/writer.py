"""Writes checkpoints in the background: a copy of the state is taken at a boundary, and the loop goes on."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightrft.checkpoint import manifest
from lightrft.checkpoint.manifest import PARTIAL
from lightrft.ops.collectives import everyone
from lightrft.strategies import state
from lightrft.strategies.state import State

if TYPE_CHECKING:
    from lightrft.trainer import RFTTrainer


class Writer:
    """Writes a run's checkpoints, one at a time. To be made, asked and closed on all ranks together.

    The ranks agree over a gloo group of their own, so that nothing in the background meets the loop's collectives; the
    thread is our own as more than one folder of torch's, the loop's state, the flush and the rename are one piece of
    work, which ``async_save`` is not.

    Args:
        trainer: set up.
    """

    def __init__(self, trainer: RFTTrainer) -> None:
        self._trainer = trainer
        self._group = dist.new_group(backend="gloo") if trainer.fabric.world_size > 1 else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", _bind, (trainer.fabric.device,))
        self._writing: Future[None] | None = None
        self._settings: dict[str, bytes] = {}
        # Once, and here: a fast tokenizer cannot be saved by one thread while another encodes with it.
        if trainer.is_global_zero:
            self._settings = _settings(trainer)

    def begin(self, folder: Path, then: Callable[[], None]) -> None:
        """Copy the state to host memory and begin to write it to ``folder``; one of that name is replaced.

        Args:
            folder: gets its name once everything of every rank is on the disk.
            then: called on rank 0, in the background, once it has.

        Raises:
            OSError: an earlier one could not be written.
        """
        self.wait()
        trainer = self._trainer
        loop = io.BytesIO()
        torch.save(trainer.state_dict(), loop)
        job = _Job(
            folder,
            {name: trained.snapshot() for name, trained in trainer.learner.trained.items()},
            {manifest.rank_file(trainer.fabric.global_rank): loop.getvalue(), **self._settings},
            trainer.fabric.global_rank,
            self._group,
            then,
        )
        self._writing = self._thread.submit(job.run)

    @property
    def busy(self) -> bool:
        """Whether something was begun whose end was not asked for; the same on every rank."""
        return self._writing is not None

    def finished(self) -> bool:
        """Whether what was begun is written on every rank. Collective.

        Raises:
            OSError: it could not be; on every rank.
        """
        assert self._writing is not None, "nothing was begun"
        waiting = torch.tensor(float(not self._writing.done()))
        if float(self._trainer.learner.sharding.over_ranks(waiting, "max")):
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
            OSError: it could not be: the disk is full, say. Nothing under a final name has changed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Give the thread and the group back; nothing may be in writing."""
        self._thread.shutdown()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
            self._group = None


@dataclass
class _Job:
    """One checkpoint, in the background thread of each rank.

    Attributes:
        folder: its final name.
        parts: this rank's part of each model, by the model's folder.
        files: what this rank writes besides.
        rank: this rank.
        group: by which the ranks agree; ``None`` for one rank.
        then: rank 0's last step.
    """

    folder: Path
    parts: dict[str, State]
    files: dict[str, bytes]
    rank: int
    group: dist.ProcessGroup | None
    then: Callable[[], None]

    def run(self) -> None:
        try:
            self._together(self._prepare)
            for name, part in self.parts.items():
                state.write(self.partial / name, part, self.group)
            sums = self._together(self._write_files)
            self._together(lambda: self._publish(sums))
        # torch reports a full disk, and gloo a rank that is gone, as a RuntimeError.
        except (OSError, RuntimeError) as error:
            if self.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise OSError(
                f"The checkpoint {self.folder} could not be written ({error}); earlier ones are intact."
            ) from error

    @property
    def partial(self) -> Path:
        return self.folder.with_name(PARTIAL + self.folder.name)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What ``work`` gives on every rank; ``OSError`` on all of them where it fails on one."""
        found: Any = None
        error: Exception | None = None
        try:
            found = work()
        except (OSError, RuntimeError) as failed:
            error = failed
        if self.group is None:
            if error is not None:
                raise error
            return [found]
        items = everyone((found, error and str(error)), self.group)
        for rank, (_, message) in enumerate(items):
            if message is not None:
                raise OSError(f"rank {rank}: {message}")
        return [one for one, _ in items]

    def _prepare(self) -> None:
        if self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
            for name in self.parts:
                (self.partial / name).mkdir(parents=True, exist_ok=True)

    def _write_files(self) -> manifest.Sums:
        for name, content in self.files.items():
            (self.partial / name).parent.mkdir(exist_ok=True)
            _write(self.partial / name, content)
        mine = [self.partial / name for name in self.files]
        for name in self.parts:
            # As torch names them; its metadata is rank 0's.
            mine += (self.partial / name).glob(f"__{self.rank}_*")
            mine += [self.partial / name / ".metadata"] if self.rank == 0 else []
        return manifest.sums_of(self.partial, mine)

    def _publish(self, sums: list[manifest.Sums]) -> None:
        if self.rank != 0:
            return
        together = {path: one for part in sums for path, one in part.items()}
        _write(self.partial / manifest.NAME, manifest.text_of(together).encode())
        for path in [*self.partial.rglob("*"), self.partial]:
            if path.is_dir():
                _flush(path)
        if self.folder.exists():
            self.folder.rename(old := self.folder.with_name(PARTIAL + "old-" + self.folder.name))
            self.partial.rename(self.folder)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.folder)
        _flush(self.folder.parent)
        self.then()


def check_writable(folder: Path, owner: str) -> None:
    """Create ``folder`` and a file in it, before hours are spent on what could not be saved there.

    Raises:
        OSError: one of them cannot be; names the owner, whose ``dirpath`` is to be set.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{owner} cannot write to {folder} ({error}); set its dirpath to a writable folder.") from error


def _bind(device: torch.device) -> None:
    """A new thread is on the first GPU, and torch's writer asks for a stream of its GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _settings(trainer: RFTTrainer) -> dict[str, bytes]:
    """The files of ``huggingface/``."""
    with tempfile.TemporaryDirectory() as place:
        trainer.model.save_settings(Path(place))
        return {f"huggingface/{file.name}": file.read_bytes() for file in Path(place).iterdir()}


def _write(file: Path, content: bytes) -> None:
    """Write and flush: what a power cut must not undo before the folder has its final name."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _flush(folder: Path) -> None:
    """The names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
