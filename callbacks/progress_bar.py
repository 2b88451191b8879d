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

    Tokens per second are those of the ``Throughput`` callback, the KL that of the algorithm, where there is one.
    """

    def __init__(self) -> None:
        self._bar: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            done = trainer.progress.iteration
            self._bar = tqdm(total=trainer.max_iterations, initial=done, unit="it", dynamic_ncols=True)

    def on_phase_start(self, trainer: Any, pl_module: Any, phase: str) -> None:
        if self._bar is not None:
            self._bar.set_description(phase)

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        if self._bar is None or phase != "iteration":
            return
        row, done = trainer.callback_metrics, trainer.progress.iteration
        self._bar.set_postfix({k: f"{row[name]:.3g}" for k, name in _SHOWN.items() if name in row}, refresh=False)
        self._bar.update(done - self._bar.n)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
