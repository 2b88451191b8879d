"""TrajectoryWriter: what was asked, answered and rewarded, as JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightrft.callback import RFTCallback
from lightrft.samples import Prompt, Response, Rollout


class TrajectoryWriter(RFTCallback):
    """Writes ``<log_dir>/trajectories/<train or val>-<step>-rank<r>.jsonl``, a line for each response.

    Where an algorithm refills groups, those that were taken are written. ``segments``, pairs of tokens and weight
    version, are in the lines of responses that several versions sampled.

    Args:
        every_n_iterations: how often training responses are written; validation's always are.
        token_ids: also write token ids and their log-probs.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, every_n_iterations: int = 1, token_ids: bool = False) -> None:
        if every_n_iterations < 1:
            raise ValueError("TrajectoryWriter needs every_n_iterations of at least 1.")
        self.every_n_iterations = every_n_iterations
        self.token_ids = token_ids

    def on_score_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
        if trainer.progress.iteration % self.every_n_iterations == 0:
            # The number of the row in metrics.csv, which an iteration gets when it is done.
            self._write(trainer, rollout, "train", trainer.progress.iteration + 1)

    def on_validation_rollout(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
        self._write(trainer, rollout, "val", trainer.progress.iteration)

    def _write(self, trainer: Any, rollout: Rollout, split: str, step: int) -> None:
        folder = Path(trainer.log_dir) / "trajectories"
        if trainer.fast_dev_run:
            return
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{split}-{step:06d}-rank{trainer.fabric.global_rank}.jsonl"
        lines = [json.dumps(self._line(prompt, response)) for prompt, response in rollout]
        # A resumed run writes the iteration's file again, whole.
        partial = folder / f".{name}"
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(folder / name)

    def _line(self, prompt: Prompt, response: Response) -> dict[str, Any]:
        line: dict[str, Any] = {
            "uid": prompt.uid,
            "source": prompt.source,
            "label": prompt.label,
            "prompt": prompt.text,
            "response": response.text,
            "reference": prompt.reference,
            "reward": response.reward,
            "reward_parts": response.reward_parts,
            "finish_reason": response.finish_reason,
            "response_tokens": len(response.token_ids),
            "dropped": response.dropped,
            "weight_version": response.weight_version,
        }
        if response.segments:
            line["segments"] = response.segments
        if self.token_ids:
            line["token_ids"] = response.token_ids.tolist()
            line["log_probs"] = response.log_probs.tolist()
        return line
