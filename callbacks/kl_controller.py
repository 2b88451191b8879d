"""KLController: the weight of the KL penalty follows the KL."""

from __future__ import annotations

import math
from typing import Any

from lightrft.callback import RFTCallback


class KLController(RFTCallback):
    """Adapts the algorithm's KL coefficient towards a target KL (Ziegler et al. 2019, arXiv 1909.08593).

    After each optimizer step, ``e = clip(kl / target - 1, -0.2, 0.2)`` and ``coefficient *= 1 + e * N / horizon``, with
    ``kl`` the step's mean over responses of the summed k1 estimate, and ``N`` its responses. Without this callback the
    coefficient stays the algorithm's.

    Args:
        target: wanted KL to the reference, nats a response.
        horizon: responses over which a constant error of 0.2 changes the coefficient by about 20 %.

    Raises:
        ValueError: not above 0.
    """

    def __init__(self, target: float, horizon: int = 10_000) -> None:
        if not 0 < target < math.inf or horizon <= 0:
            raise ValueError(f"KLController needs a finite target ({target}) and a horizon ({horizon}) above 0.")
        self.target = target
        self.horizon = horizon

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse where it would have no effect, or could turn the penalty into a reward.

        Raises:
            ValueError: the algorithm has no KL, or ``horizon`` is shorter than one step.
        """
        if not pl_module.algorithm.needs_reference:
            raise ValueError("KLController has no effect: the algorithm has no KL (kl: none). Remove one.")
        if self.horizon < trainer.responses_per_update:
            raise ValueError(
                f"KLController.horizon={self.horizon} is shorter than one update ({trainer.responses_per_update} "
                "responses); raise it to at least that."
            )

    def on_update_end(self, trainer: Any, pl_module: Any, outputs: dict[str, float]) -> None:
        algorithm, kl = pl_module.algorithm, outputs.get("kl/reference_per_response", math.nan)
        if math.isfinite(kl):  # not so in a skipped update, nor while only the critic trains
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            algorithm.kl_coefficient *= 1 + error * outputs["responses"] / self.horizon
        trainer.log("kl_coefficient", algorithm.kl_coefficient)
