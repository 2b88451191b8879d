"""ProgressBar: iterations with reward, KL, lengths and tokens per second."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from lightrft.callback import RFTCallback

_SHOWN = {
    "reward": "reward/mean",
    "kl": "kl/reference",
    "length": "response_tokens/mean",
    "tokens/s": "throughput/tokens_per_second",
}


class ProgressBar(RFTCallback):
    """One bar over iterations on rank 0; the phase it is in, and the last iteration's numbers.

    Args:
        refresh_every_n_iterations: how often the numbers are written.
    """

    def __init__(self, refresh_every_n_iterations: int = 1) -> None:
        self.refresh_every_n_iterations = refresh_every_n_iterations
        self._bar: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            done = trainer.progress.iteration
            self._bar = tqdm(total=trainer.max_iterations, initial=done, unit="it", dynamic_ncols=True)

    def on_phase_start(self, trainer: Any, pl_module: Any, phase: str) -> None:
        if self._bar is not None:
            self._bar.set_description(phase, refresh=False)

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        if self._bar is None or phase != "iteration":
            return
        row, done = trainer.callback_metrics, trainer.progress.iteration
        if done % self.refresh_every_n_iterations == 0 or done == trainer.max_iterations:
            self._bar.set_postfix({k: f"{row[name]:.3g}" for k, name in _SHOWN.items() if name in row}, refresh=False)
            self._bar.update(done - self._bar.n)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
