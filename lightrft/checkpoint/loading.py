"""Finds a checkpoint and restores it into a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightrft.checkpoint import best, manifest
from lightrft.checkpoint.reshard import resharded

if TYPE_CHECKING:
    from lightrft.trainer import RFTTrainer


def load(folder: Path, trainer: RFTTrainer, weights_only: bool = False) -> None:
    """Restore ``folder`` into a trainer that is set up, on all ranks together; their number may be another.

    Args:
        folder: a complete checkpoint.
        trainer: set up with the same seed and sizes.
        weights_only: leave loop and optimizer as they are (validation).

    Raises:
        ValueError: it was written by a run with another seed, other sizes, another optimizer or another model, or its
            files are damaged.
    """
    fabric, learner = trainer.fabric, trainer.learner
    sums = manifest.verify(folder, fabric.global_rank, fabric.world_size, learner.sharding.everyone)
    if weights_only:
        progress = _loop_state(folder, 0)["progress"]
        trainer.progress.weight_version, trainer.progress.iteration = progress["weight_version"], progress["iteration"]
    else:
        trainer.load_state_dict(_state_for(folder, trainer, manifest.ranks_of(sums)))
    try:
        for name, trained in learner.trained.items():
            trained.load(folder / name, weights_only)
    # A folder that is not there, or names, shapes and parameter groups that do not fit.
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The weights in {folder} do not fit this run's model and optimizer: {reason}") from error


def _state_for(folder: Path, trainer: RFTTrainer, ranks: int) -> dict[str, Any]:
    if ranks == trainer.fabric.world_size:
        return _loop_state(folder, trainer.fabric.global_rank)
    return resharded([_loop_state(folder, rank) for rank in range(ranks)], trainer)


def _loop_state(folder: Path, rank: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / manifest.rank_file(rank), map_location="cpu", weights_only=True)
    return state


def find(path: str, roots: list[Path]) -> Path:
    """The checkpoint folder at ``path``; for ``last`` the newest complete one anywhere under ``roots``, and for
    ``best`` the one that the newest ``best.json`` there names.

    Raises:
        ValueError: there is none.
    """
    if path not in ("last", "best"):
        if not manifest.is_checkpoint(Path(path)):
            raise ValueError(f"ckpt_path {path!r} is no checkpoint folder (it has no {manifest.NAME}).")
        return Path(path)
    name = manifest.NAME if path == "last" else best.NAME
    files = sorted((file for root in roots for file in root.glob(f"**/{name}")), key=_age)
    found = [file.parent if path == "last" else best.best_in(file) for file in files]
    folders = [folder for folder in found if folder is not None and manifest.is_checkpoint(folder)]
    if not folders:
        hint = "" if path == "last" else " that was kept as the best (RFTCheckpoint.monitor)"
        raise ValueError(
            f"ckpt_path is {path!r}, but there is no checkpoint{hint} under {' or '.join(map(str, roots))}."
        )
    return folders[0]


def _age(file: Path) -> int:
    """Nanoseconds before now, the newest first; of a checkpoint that of its folder, which the rename gave its name."""
    return -(file if file.name == best.NAME else file.parent).stat().st_mtime_ns
