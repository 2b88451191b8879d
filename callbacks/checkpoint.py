"""RFTCheckpoint: when and where checkpoints are written, and which are kept."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightrft.callback import CheckpointCallback
from lightrft.checkpoint import Best, Writer, check_writable


class RFTCheckpoint(CheckpointCallback):
    """Writes atomic checkpoints from which a run resumes exactly, and keeps the newest, and the best.

    With ``monitor``, ``best.json`` beside the checkpoints names the best one, which ``--ckpt_path best`` finds. A
    checkpoint competes by the value in the metrics' row of the iteration it ends; one that ends no iteration, or whose
    row lacks the value (validation was not due) or has not a number there, does not.

    Args:
        dirpath: folder of the checkpoints; ``None`` is ``<log_dir>/checkpoints``.
        every_n_iterations: how often, and always after the last iteration and when the run is stopped.
        at: ``iteration`` saves after a whole iteration, ``update`` also after each optimizer step of it, ``phase`` at
            every boundary.
        max_keep: newest checkpoints kept, besides the best; older ones of this run are deleted.
        monitor: metric by which one is the best, e.g. ``val/reward/mean``; ``None`` keeps none for that.
        mode: whether its largest or smallest value is best.
        asynchronous: copy the state to host memory and write it while the loop goes on, one checkpoint at a time; a
            failure stops the run at the next boundary. ``false`` waits for each.

    Attributes:
        last_checkpoint: the newest complete one.

    Raises:
        ValueError: a number below 1, an unknown moment or mode.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_iterations: int = 10,
        at: Literal["iteration", "update", "phase"] = "iteration",
        max_keep: int = 2,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        asynchronous: bool = True,
    ) -> None:
        if every_n_iterations < 1 or max_keep < 1:
            raise ValueError("RFTCheckpoint needs every_n_iterations and max_keep of at least 1.")
        if at not in ("iteration", "update", "phase"):
            raise ValueError(f"at is {at!r}; it must be iteration, update or phase.")
        if mode not in ("min", "max"):
            raise ValueError(f"mode is {mode!r}; it must be min or max.")
        self.dirpath = dirpath
        self.every_n_iterations = every_n_iterations
        self.at = at
        self.max_keep = max_keep
        self.monitor = monitor
        self.mode = mode
        self.asynchronous = asynchronous
        self.last_checkpoint: Path | None = None
        self._written: list[Path] = []  # the one that is being written is the last
        self._best: Best | None = None
        self._writer: Writer | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out before training whether checkpoints can be written.

        Raises:
            OSError: the folder is not writable, or its disk has no room for one more checkpoint than are kept.
        """
        folder = self._folder(trainer)
        if trainer.fast_dev_run:
            return
        check_writable(folder, "RFTCheckpoint")
        kept = self.max_keep + (self.monitor is not None)
        needed = sum(trained.checkpoint_bytes for trained in trainer.learner.trained.values()) * (kept + 1)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(
                f"RFTCheckpoint needs {needed / 2**30:.1f} GiB in {folder} (max_keep={self.max_keep}"
                f"{', the best' if self.monitor else ''} and one being written), {free / 2**30:.1f} GiB are free; "
                "free space, lower max_keep or set dirpath."
            )
        self._writer = Writer(trainer)

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        """Begin a checkpoint where one is due, and learn how the earlier one ended.

        Raises:
            OSError: it could not be written.
        """
        if self._writer is None:
            return
        if self._writer.busy and self._writer.finished():
            self._conclude()
        iteration = trainer.progress.iteration
        if phase == "iteration":
            due = iteration % self.every_n_iterations == 0 or iteration == trainer.max_iterations
        else:
            due = (iteration + 1) % self.every_n_iterations == 0 and self.at in ("phase", phase)
        if due or trainer.should_stop:
            self._begin(trainer)
            if not self.asynchronous:
                self._wait()

    def save(self, trainer: Any) -> Path:
        folder = self._begin(trainer)
        self._wait()
        return folder

    def _begin(self, trainer: Any) -> Path:
        assert self._writer is not None, "made when training began"
        progress = trainer.progress
        name = f"iteration-{progress.iteration:06d}"
        if progress.phase != "rollout":
            name += f"-before-{progress.phase}-{progress.update}"
        folder = self._folder(trainer) / name
        if folder in (self.last_checkpoint, *self._written[-1:]):  # a stop at a boundary that is saved already
            return folder
        self._wait()
        if progress.phase == "rollout":
            self._compare(trainer.callback_metrics, folder)
        self._written.append(folder)
        keep = {*self._written[-self.max_keep :], *([Path(self._best.folder)] if self._best else [])}
        old = [one for one in self._written if one not in keep]
        self._written = [one for one in self._written if one in keep]
        self._writer.begin(folder, then=partial(self._tidy, folder.parent, self._best, old))
        return folder

    def _compare(self, row: dict[str, float], folder: Path) -> None:
        if self.monitor is None:
            return
        if self.monitor not in row:
            rank_zero_warn(
                f"{folder.name} does not compete for the best checkpoint: its row has no {self.monitor!r}. Measure it "
                f"at the iterations at which RFTCheckpoint saves. There are {', '.join(sorted(row))}."
            )
            return
        candidate = Best(str(folder), self.monitor, self.mode, row[self.monitor])
        if candidate.beats(self._best):
            self._best = candidate

    @staticmethod
    def _tidy(folder: Path, best: Best | None, old: list[Path]) -> None:
        """Once the new one is there, and before any is deleted, ``best.json`` names one that is."""
        if best is not None:
            best.write(folder)
        for one in old:
            shutil.rmtree(one, ignore_errors=True)

    def _wait(self) -> None:
        if self._writer is not None and self._writer.busy:
            self._writer.wait()
            self._conclude()

    def _conclude(self) -> None:
        self.last_checkpoint = self._written[-1]

    def _folder(self, trainer: Any) -> Path:
        return Path(self.dirpath) if self.dirpath else Path(trainer.log_dir) / "checkpoints"

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for what is being written.

        Raises:
            OSError: it could not be.
        """
        self._wait()
        if self.last_checkpoint:
            best = f", best: {Path(self._best.folder).name} ({self._best.value:.4g})" if self._best else ""
            rank_zero_info(f"Checkpoint: {self.last_checkpoint}{best}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "written": [str(folder) for folder in self._written],
            "best": asdict(self._best) if self._best else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._written = [folder for folder in map(Path, state_dict["written"]) if folder.exists()]
        best = Best(**state_dict["best"]) if state_dict["best"] else None
        same = best is not None and (best.monitor, best.mode) == (self.monitor, self.mode)
        self._best = best if same and best is not None and Path(best.folder).exists() else None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Wait for what is being written, and say from where to resume."""
        try:
            self._wait()
        except OSError as error:
            warnings.warn(str(error), stacklevel=2)
        where = f"resume with --ckpt_path {self.last_checkpoint}" if self.last_checkpoint else "none was written yet"
        # On the rank that failed: the main one may be waiting for it.
        warnings.warn(f"The run failed ({type(exception).__name__}); last complete checkpoint: {where}.", stacklevel=2)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
