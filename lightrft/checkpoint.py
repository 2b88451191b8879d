"""Checkpoint folders: written whole or not at all, read back exactly.

A folder holds what the sharding strategy writes (weights, optimizer) and one ``rank-<r>.pt`` with the loop's state of
each rank. It is written under a hidden name, flushed to the disk, and renamed: a killed writer leaves the earlier
checkpoints as they were and never a half-written one under a final name.
"""

from __future__ import annotations

import os
import shutil
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
    if fabric.is_global_zero:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    fabric.barrier()
    try:
        learner.sharding.save(partial, trainer.model.actor, learner.optimizer)
        torch.save(trainer.state_dict(), partial / _rank_file(fabric.global_rank))
        _flush(partial)
    # torch reports a full disk while closing its archive as a RuntimeError.
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"The checkpoint {folder} could not be written ({error}); earlier checkpoints are intact.") from error
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


def load(folder: Path, trainer: RFTTrainer, weights_only: bool = False) -> None:
    """Restore ``folder`` into a trainer that is set up.

    Args:
        folder: a complete checkpoint.
        trainer: set up with the same seed and sizes.
        weights_only: leave loop and optimizer as they are (validation).

    Raises:
        ValueError: it was written by a run with another seed, other sizes or another number of ranks.
    """
    learner = trainer.learner
    path = folder / _rank_file(trainer.fabric.global_rank)
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}: it was written with fewer ranks; resume with as many.")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if weights_only:
        learner.sharding.load(folder, trainer.model.actor, None)
        trainer.progress.weight_version = state["progress"]["weight_version"]
        return
    learner.sharding.load(folder, trainer.model.actor, learner.optimizer)
    trainer.load_state_dict(state)


def find(path: str, root: Path) -> Path:
    """The checkpoint folder at ``path``, or for ``last`` the newest complete one anywhere under ``root``.

    Raises:
        ValueError: there is none.
    """
    if path != "last":
        if not (Path(path) / _rank_file(0)).is_file():
            raise ValueError(f"ckpt_path {path!r} is no checkpoint folder (it has no {_rank_file(0)}).")
        return Path(path)
    folders = [file.parent for file in root.glob(f"**/{_rank_file(0)}") if not file.parent.name.startswith(_PARTIAL)]
    if not folders:
        raise ValueError(f"ckpt_path is 'last', but there is no checkpoint under {root}.")
    return max(folders, key=lambda folder: folder.stat().st_mtime_ns)


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _flush(folder: Path) -> None:
    """Make the files' contents survive a power cut before their folder gets its final name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
