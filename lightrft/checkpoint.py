"""Checkpoint folders: written whole or not at all, read back exactly.

A folder holds what the sharding strategy writes (weights, optimizer; a critic's in ``critic/``) and one
``rank-<r>.pt`` with the loop's state of each rank. It is written under a hidden name, flushed to the disk, and renamed:
a killed writer leaves the earlier checkpoints as they were and never a half-written one under a final name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightrft.trainer import RFTTrainer

_PARTIAL = ".partial-"


def save(folder: Path, trainer: RFTTrainer) -> None:
    """Write the run's state to ``folder`` on all ranks together; a folder of that name is replaced.

    Raises:
        OSError: the disk is full or not writable; says so, and nothing under a final name has changed.
    """
    partial = folder.with_name(_PARTIAL + folder.name)
    fabric, learner = trainer.fabric, trainer.learner
    try:
        if fabric.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        fabric.barrier()
        for name, trained in learner.trained.items():
            if fabric.is_global_zero:
                (partial / name).mkdir(exist_ok=True)
            fabric.barrier()
            learner.sharding.save(partial / name, trained.origin, trained.optimizer)
        torch.save(trainer.state_dict(), partial / _rank_file(fabric.global_rank))
        _flush(partial)
    # torch reports a full disk while closing its archive as a RuntimeError.
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"The checkpoint {folder} could not be written ({error}); earlier ones are intact.") from error
    fabric.barrier()
    if fabric.is_global_zero:
        if folder.exists():
            folder.rename(old := folder.with_name(_PARTIAL + "old-" + folder.name))
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
        _flush_entry(folder.parent)
    fabric.barrier()


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


def load(folder: Path, trainer: RFTTrainer, weights_only: bool = False) -> None:
    """Restore ``folder`` into a trainer that is set up.

    Args:
        folder: a complete checkpoint.
        trainer: set up with the same seed and sizes.
        weights_only: leave loop and optimizer as they are (validation).

    Raises:
        ValueError: it was written by a run with another seed, other sizes, another optimizer, another model or another
            number of ranks, or its files are damaged.
    """
    learner, rank = trainer.learner, trainer.fabric.global_rank
    path = folder / _rank_file(0 if weights_only else rank)
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}: it was written with fewer ranks; resume with as many.")
    for file in sorted(folder.rglob("*.pt")) if rank == 0 else [path]:
        _check_intact(file)
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if weights_only:
        trainer.progress.weight_version = state["progress"]["weight_version"]
        trainer.progress.iteration = state["progress"]["iteration"]
    else:
        trainer.load_state_dict(state)
    try:
        for name, trained in learner.trained.items():
            learner.sharding.load(folder / name, trained.origin, None if weights_only else trained.optimizer)
    # A file that is not there, or what torch says of names, shapes and parameter groups that do not fit.
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The weights in {folder} do not fit this run's model and optimizer: {reason}") from error


def find(path: str, roots: list[Path]) -> Path:
    """The checkpoint folder at ``path``, or for ``last`` the newest complete one anywhere under ``roots``.

    Raises:
        ValueError: there is none.
    """
    if path != "last":
        if not (Path(path) / _rank_file(0)).is_file():
            raise ValueError(f"ckpt_path {path!r} is no checkpoint folder (it has no {_rank_file(0)}).")
        return Path(path)
    found = [file.parent for root in roots for file in root.glob(f"**/{_rank_file(0)}")]
    folders = [folder for folder in found if not folder.name.startswith(_PARTIAL)]
    if not folders:
        raise ValueError(f"ckpt_path is 'last', but there is no checkpoint under {' or '.join(map(str, roots))}.")
    return max(folders, key=lambda folder: folder.stat().st_mtime_ns)


def _check_intact(file: Path) -> None:
    """Raise ``ValueError`` where a file is cut short or a bit of it changed: torch itself reads wrong numbers then."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}); resume from another checkpoint.") from error
    if damaged is not None:
        raise ValueError(f"{file} is damaged (its part {damaged} is not what was written); resume from another one.")


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _flush(folder: Path) -> None:
    """Make the files' contents survive a power cut before their folder gets its final name."""
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    """A file's contents, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
