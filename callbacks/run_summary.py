"""RunSummary: what a run achieved, as a table and as ``summary.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightrft.callback import RFTCallback, the_one
from lightrft.callbacks.throughput import Throughput
from lightrft.callbacks.validation import Validation


class RunSummary(RFTCallback):
    """Writes ``<log_dir>/summary.json`` and prints its table at the end of training.

    The keys are ``metric`` (a mean reward, which is an accuracy where rewards are 0 or 1), its value as
    ``accuracy_before`` and ``accuracy_after``, ``seconds`` (of all iterations, validation apart),
    ``tokens_per_second`` and ``artefacts``; ``null`` is what was not measured. It reads the run's ``Validation`` and
    ``Throughput`` callbacks.

    Attributes:
        accuracy: the validation metric that is shown as accuracy, without ``val/``; a subclass may name another.
    """

    accuracy: str = "reward/mean"

    @property
    def _name(self) -> str:
        return f"val/{self.accuracy}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse before training where there will be nothing to sum up.

        Raises:
            ValueError: ``Validation`` (with ``at_start``) or ``Throughput`` is not among the callbacks.
        """
        validation = the_one(trainer.callbacks, Validation)
        if validation is None or not validation.at_start or the_one(trainer.callbacks, Throughput) is None:
            raise ValueError("RunSummary needs the callbacks Validation (at_start: true) and Throughput beside it.")

    def on_iteration_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse, once the first validation is there, an accuracy that it does not measure.

        Raises:
            ValueError: names the metrics there are.
        """
        first = the_one(trainer.callbacks, Validation).first
        # Where no response could be scored, no reward was measured.
        if first and self._name not in first and first["val/dropped_fraction"] < 1:
            names = ", ".join(sorted(name.removeprefix("val/") for name in first))
            raise ValueError(
                f"{type(self).__name__}.accuracy={self.accuracy!r} is not measured by validation; use one of {names}."
            )

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        folder = Path(trainer.log_dir)
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        validation, throughput = the_one(trainer.callbacks, Validation), the_one(trainer.callbacks, Throughput)
        summary = {
            "metric": self._name,
            "accuracy_before": validation.first.get(self._name),
            "accuracy_after": validation.last.get(self._name),
            "seconds": throughput.seconds,
            "tokens_per_second": throughput.tokens / throughput.seconds if throughput.seconds else None,
            "artefacts": str(folder),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for key, value in summary.items():
            print(f"{key.replace('_', ' '):18s} {value:.4g}" if isinstance(value, float) else f"{key:18s} {value}")
