"""WeightSync: the engine samples with the trainer's current weights, or the run stops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightrft.callback import RFTCallback
from lightrft.engines import EngineError
from lightrft.ops import Fingerprint, fingerprint, pack

_PROBE_SEQUENCES, _PROBE_TOKENS = 2, 16
# Nats: twice what an engine with 8-bit weights differs by; beyond it nothing is right, whatever the first sync says.
_LARGEST_MISMATCH = 0.5


class StaleWeightsError(EngineError):
    """The engine does not compute with the weights that were pushed."""


class WeightSync(RFTCallback):
    """Pushes the policy's weights into the engine whenever they are newer, and probes that they arrived.

    The probe has two parts. The fingerprint of every pushed tensor is computed again inside the engine: one skipped or
    half-done update is seen, however small the step. Log-probs of a few fixed tokens are compared with the trainer's:
    a wrong name, a stale cache or other arithmetic is seen; their tolerance is calibrated at the first sync. Both run
    each time that the engine wakes, pushed to or not: what it held may have been lost while it slept.

    Args:
        probe: ``false`` switches both parts off.
    """

    def __init__(self, probe: bool = True) -> None:
        self.probe = probe
        self.calibrated: float | None = None
        self._version = -1
        self._pushed: dict[str, Fingerprint] = {}

    @property
    def tolerance(self) -> float:
        """Largest mean difference that passes, nats. Kernels and dtypes differ by a fairly constant amount."""
        return min(max(4 * (self.calibrated or 0.0), 1e-3), _LARGEST_MISMATCH)

    def on_weight_sync(self, trainer: Any, pl_module: Any) -> None:
        """Push unless the engine is current, and probe.

        Raises:
            StaleWeightsError: the engine holds other weights than were pushed; names the tensor and the difference.
        """
        engine, version = trainer.rollout.engine, trainer.progress.weight_version
        start = time.perf_counter()
        # Both words: an engine may call weights current that this callback never pushed.
        stale = engine.weight_version != version or self._version != version
        # Together, as the weights may be gathered from all ranks: those of every rank if one engine wants them.
        if trainer.learner.sharding.over_ranks(torch.tensor(float(stale)), "max"):
            self._pushed, self._version = {}, version
            weights = self._recorded(trainer, pl_module)
            engine.update_weights(weights, version)
            for _ in weights:  # and to the last, whatever this rank's engine takes of them
                pass
        if self.probe:
            _compare_fingerprints(self._pushed, engine.fingerprint(list(self._pushed)), version)
        trainer.log("time/weight_sync_seconds", time.perf_counter() - start)

    def on_engine_ready(self, trainer: Any, pl_module: Any) -> None:
        """The engine can compute with what was pushed: compare its log-probs.

        Raises:
            StaleWeightsError: they differ by more than the tolerance.
        """
        if self.probe:
            trainer.log("weight_sync/mismatch_nats", self._compare_log_probs(trainer, trainer.rollout.engine))

    def _recorded(self, trainer: Any, pl_module: Any) -> Iterator[tuple[str, Tensor]]:
        """The weights in the engine's dtype; what is handed over is what is remembered."""
        dtype = trainer.rollout.engine.dtype
        for name, tensor in pl_module.export_parameters():
            tensor = tensor.detach().to(dtype or tensor.dtype)
            if self.probe:
                self._pushed[name] = fingerprint(tensor)
            yield name, tensor

    @torch.no_grad()
    def _compare_log_probs(self, trainer: Any, engine: Any) -> float:
        """Mean absolute difference of the probe tokens' log-probs, in nats."""
        sequences = _probe_sequences(len(trainer.model.tokenizer))
        ones = torch.ones(len(sequences), dtype=torch.int64)
        mask = torch.ones(len(sequences), _PROBE_TOKENS - 1, dtype=torch.bool)
        packed = pack(sequences, ones, mask).to(trainer.fabric.device)
        actor = trainer.learner.actor.eval()
        ours, _ = actor(packed.input_ids, packed.position_ids, packed.cu_seqlens, packed.predict)
        theirs = torch.cat(engine.score(sequences)).to(ours)
        mismatch = float((ours - theirs).abs().mean())
        if self.calibrated is None:
            self.calibrated = mismatch
        if not mismatch <= self.tolerance:
            raise StaleWeightsError(
                f"After a weight sync the engine's log-probs of {_PROBE_SEQUENCES * (_PROBE_TOKENS - 1)} probe tokens "
                f"differ from the trainer's by {mismatch:.4g} nats on average (tolerance {self.tolerance:.4g}); the "
                "weights are in place, so a name, a cache or the engine's arithmetic is wrong."
            )
        return mismatch

    def state_dict(self) -> dict[str, Any]:
        return {"calibrated": self.calibrated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calibrated = state_dict["calibrated"]


def _probe_sequences(vocabulary: int) -> list[Tensor]:
    """The same pseudo-random tokens at every sync."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(vocabulary, (_PROBE_SEQUENCES, _PROBE_TOKENS), generator=generator))


def _compare_fingerprints(pushed: dict[str, Fingerprint], held: dict[str, Fingerprint], version: int) -> None:
    wrong = [name for name in pushed if held.get(name) != pushed[name]]
    if not wrong:
        return
    name = wrong[0]
    if name not in held:
        what = "the engine does not hold it"
    elif held[name].numel != pushed[name].numel:
        what = f"the engine holds {held[name].numel} elements instead of {pushed[name].numel}"
    else:
        what = f"the projections differ by {held[name].difference(pushed[name]):.6g}"
    raise StaleWeightsError(
        f"The engine does not hold the weights of version {version}: {len(wrong)} of {len(pushed)} tensors are others, "
        f"first {name} ({what}). It would have sampled with stale weights."
    )
