"""Throughput: seconds, tokens per second and peak memory of each phase, as metrics."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lightrft.callback import RFTCallback
from lightrft.samples import Rollout


class Throughput(RFTCallback):
    """Logs ``time/<phase>_seconds``, ``memory/<phase>_peak_gib`` and ``throughput/...`` with each iteration.

    ``throughput/tokens_per_second`` is response tokens an iteration over its seconds (validation apart).
    ``throughput/rollout_tokens_per_second`` is over ``time/sampling_seconds``, in which responses were sampled, those
    of a refill too. ``throughput/update_tokens_per_second`` is of that phase alone and counts prompts too. Tokens are
    of all ranks. Peak memory is the device's, on a CPU the process's.

    Attributes:
        seconds, tokens: of all iterations so far, resumed parts included.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0.0
        self._phases: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._sampled = self._trained = 0
        self._sampling = 0.0

    def on_phase_start(self, trainer: Any, pl_module: Any, phase: str) -> None:
        _reset_peak_memory(trainer.fabric.device)
        self._started = time.perf_counter()

    def on_phase_end(self, trainer: Any, pl_module: Any, phase: str) -> None:
        if trainer.fabric.device.type == "cuda":
            torch.cuda.synchronize(trainer.fabric.device)
        self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - self._started
        self._peaks[phase] = max(self._peaks.get(phase, 0.0), _peak_memory(trainer.fabric.device))
        if phase == "iteration":
            self._phases, self._peaks, self._sampled, self._trained, self._sampling = {}, {}, 0, 0, 0.0

    def on_rollout_start(self, trainer: Any, pl_module: Any, prompts: Any) -> None:
        self._began_sampling = time.perf_counter()

    def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Rollout) -> None:
        """Of the phase ``rollout``, and of a refill in the phase ``score``."""
        self._sampling += time.perf_counter() - self._began_sampling
        self._sampled += sum(len(response.token_ids) for _, response in rollout)
        self._sampled += sum(len(response.token_ids) for response in rollout.greedy)

    def on_update_start(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        self._trained += sum(batch.sequence_lengths)

    def on_iteration_end(self, trainer: Any, pl_module: Any) -> None:
        counts = torch.tensor([self._sampled, self._trained], dtype=torch.float64, device=trainer.fabric.device)
        sampled, trained = trainer.fabric.all_reduce(counts, reduce_op="sum").tolist()
        total = sum(self._phases.values())
        self.seconds, self.tokens = self.seconds + total, self.tokens + sampled
        rates = {"tokens": (sampled, total)}
        rates["rollout_tokens"] = (sampled, self._sampling)
        rates["update_tokens"] = (trained, self._phases.get("update", 0.0))
        for name, (tokens, seconds) in rates.items():
            trainer.log(f"throughput/{name}_per_second", tokens / seconds if seconds else 0.0)
        trainer.log("time/sampling_seconds", self._sampling)
        for phase, seconds in self._phases.items():
            trainer.log(f"time/{phase}_seconds", seconds)
            trainer.log(f"memory/{phase}_peak_gib", self._peaks[phase] / 2**30)

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "phases": dict(self._phases),
            "peaks": dict(self._peaks),
            "sampled": self._sampled,
            "sampling": self._sampling,
            "trained": self._trained,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.tokens = state_dict["seconds"], state_dict["tokens"]
        self._phases, self._peaks = dict(state_dict["phases"]), dict(state_dict["peaks"])
        self._sampled, self._trained = state_dict["sampled"], state_dict["trained"]
        self._sampling = state_dict["sampling"]

    def reshard(self, states: list[dict[str, Any]], rank: int, ranks: int) -> dict[str, Any]:
        """What each rank counted in this iteration is summed over ranks at its end: the first one takes it all over."""
        counted = {name: sum(state[name] for state in states) if rank == 0 else 0 for name in ("sampled", "trained")}
        return super().reshard(states, rank, ranks) | counted


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or forbidden: the peak is then that of the process so far
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))


def _peak_memory(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
        return next(float(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
