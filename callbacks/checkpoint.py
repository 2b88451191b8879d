"""RFTCheckpoint: when and where checkpoints are written."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_info

from lightrft import checkpoint
from lightrft.callback import CheckpointCallback


class RFTCheckpoint(CheckpointCallback):
    """Writes atomic checkpoints from which a run resumes exactly, and keeps the newest.

    Args:
        dirpath: folder of the checkpoints; ``None`` is ``<log_dir>/checkpoints``.
        every_n_iterations: how often, and always after the last iteration and when the run is stopped.
        at: ``iteration`` saves after a whole iteration, ``update`` also after each optimizer step of it, ``phase`` at
            every boundary.
        max_keep: newest checkpoints kept; older ones of this run are deleted.

    Raises:
        ValueError: a number below 1, or an unknown moment.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_iterations: int = 10,
        at: Literal["iteration", "update", "phase"] = "iteration",
        max_keep: int = 2,
    ) -> None:
        if every_n_iterations < 1 or max_keep < 1:
            raise ValueError("RFTCheckpoint needs every_n_iterations and max_keep of at least 1.")
        if at not in ("iteration", "update", "phase"):
            raise ValueError(f"at is {at!r}; it must be iteration, update or phase.")
        self.dirpath = dirpath
        self.every_n_iterations = every_n_iterations
        self.at = at
        self.max_keep = max_keep
        self.last_checkpoint: Path | None = None
        self._written: list[Path] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out before training whether checkpoints can be written.

        Raises:
            OSError: the folder is not writable, or its disk has no room for one more checkpoint than are kept.
        """
        folder = self._folder(trainer)
        if trainer.fast_dev_run:
            return
        checkpoint.check_writable(folder, "RFTCheckpoint")
        models = [trained.origin for trained in trainer.learner.trained.values()]
        needed = sum(map(_bytes_of_a_checkpoint, models)) * (self.max_keep + 1)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(
                f"RFTCheckpoint needs {needed / 2**30:.1f} GiB in {folder} (max_keep={self.max_keep} and one being "
                f"written), {free / 2**30:.1f} GiB are free; free space, lower max_keep or set dirpath."
            )

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        iteration = trainer.progress.iteration
        if phase == "iteration":
            due = iteration % self.every_n_iterations == 0 or iteration == trainer.max_iterations
        else:
            due = (iteration + 1) % self.every_n_iterations == 0 and self.at in ("phase", phase)
        if (due or trainer.should_stop) and not trainer.fast_dev_run:
            self.save(trainer)

    def save(self, trainer: Any) -> Path:
        progress = trainer.progress
        name = f"iteration-{progress.iteration:06d}"
        if progress.phase != "rollout":
            name += f"-before-{progress.phase}-{progress.update}"
        folder = self._folder(trainer) / name
        if folder == self.last_checkpoint:  # a stop at a boundary that is saved already
            return folder
        checkpoint.save(folder, trainer)
        self.last_checkpoint = folder
        self._written.append(folder)
        self._prune(trainer)
        return folder

    def _prune(self, trainer: Any) -> None:
        old, self._written = self._written[: -self.max_keep], self._written[-self.max_keep :]
        if trainer.is_global_zero:
            for folder in old:
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, trainer: Any) -> Path:
        return Path(self.dirpath) if self.dirpath else Path(trainer.log_dir) / "checkpoints"

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.last_checkpoint:
            rank_zero_info(f"Checkpoint: {self.last_checkpoint}")

    def state_dict(self) -> dict[str, Any]:
        return {"written": [str(folder) for folder in self._written]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._written = [folder for folder in map(Path, state_dict["written"]) if folder.exists()]

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        where = f"resume with --ckpt_path {self.last_checkpoint}" if self.last_checkpoint else "none was written yet"
        # On the rank that failed: the main one may be waiting for it.
        warnings.warn(f"The run failed ({type(exception).__name__}); last complete checkpoint: {where}.", stacklevel=2)


def _bytes_of_a_checkpoint(module: Any) -> int:
    """Weights, and two moments of each trained one in Adam."""
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return weights + 2 * trained
