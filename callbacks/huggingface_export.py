"""HuggingFaceExport: a folder that ``from_pretrained`` and ``lightrft chat`` load, at the end of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info

from lightrft.callback import RFTCallback
from lightrft.checkpoint import check_writable


class HuggingFaceExport(RFTCallback):
    """Writes weights (adapters merged), configuration and tokenizer; sharded weights too, which rank 0 puts together in
    host memory. Works under Lightning's ``Trainer`` too. ``lightrft export`` does the same with a checkpoint.

    Args:
        dirpath: the folder; ``None`` is ``<log_dir>/huggingface``.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out before training whether the model can be written.

        Raises:
            OSError: the folder is not writable.
        """
        folder = self._folder(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            check_writable(folder, "HuggingFaceExport")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        folder = self._folder(trainer)
        if not trainer.fast_dev_run:
            pl_module.save_pretrained(folder)
            rank_zero_info(f"Hugging Face model: {folder}")

    def _folder(self, trainer: Any) -> Path:
        return Path(self.dirpath) if self.dirpath else Path(trainer.log_dir) / "huggingface"
