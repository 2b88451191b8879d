"""WeightSync: the engine samples with the trainer's current weights, or the run stops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightrft.callback import RFTCallback
from lightrft.engines import Engine, EngineError
from lightrft.media import placeholder_ids
from lightrft.ops import Fingerprint, Fingerprints, pack
from lightrft.samples import Prompt, Reading, Sampling
from lightrft.whereabouts import mark

# Longer than two of the blocks in which engines cache prefixes (16 tokens); each is continued a little.
_PROBE_PROMPTS, _PROBE_TOKENS, _PROBE_NEW_TOKENS = 4, 33, 4
_TOKENS_WITH_MEDIA = 8
PROBE = (_PROBE_PROMPTS, _PROBE_TOKENS + _PROBE_NEW_TOKENS, _PROBE_TOKENS + _PROBE_NEW_TOKENS - 1)
"""What the trainer computes for a probe: sequences, tokens and predictions of each."""
# Nats: twice what an engine with 8-bit weights differs by; beyond it nothing is right, whatever the first sync says.
_LARGEST_MISMATCH = 0.5


class StaleWeightsError(EngineError):
    """The engine does not compute with the weights that were pushed."""


class WeightSync(RFTCallback):
    """Pushes the policy's weights into the engine whenever they are newer, and probes that they arrived.

    The probe has two parts. The fingerprint of every pushed tensor is computed again inside the engine: one skipped or
    half-done update is seen, however small the step. Log-probs of a few fixed tokens, scored, and of some sampled after
    them, and after a small image or sound where the model takes such, are compared with the trainer's: a wrong name, a
    stale cache of prefixes or of images, or other arithmetic is seen, once it makes more than the tolerance, which is
    calibrated at the first sync. Both run each time that the engine wakes, pushed to or not: what it held may have been
    lost while it slept.

    Frozen weights travel once, and again where the engine has lost them. They are probed all the same.

    Args:
        lora: what an engine gets of a model with LoRA. ``merged`` is weights with the adapter added. ``adapter`` is the
            base once and then the adapter alone, which the engine, if it can, applies beside it: far fewer bytes, and
            the sum is not rounded to the engine's dtype.

    Attributes:
        probe: ``False``, in a subclass or on an object, switches both parts off.

    Raises:
        ValueError: another ``lora``; or ``adapter`` and a model without (when the run starts).
    """

    probe: bool = True

    def __init__(self, lora: Literal["merged", "adapter"] = "merged") -> None:
        if lora not in ("merged", "adapter"):
            raise ValueError(f"lora is {lora!r}; it must be merged or adapter.")
        self.lora = lora
        self.calibrated: float | None = None
        self._version = -1
        self._frozen: frozenset[str] = frozenset()
        self._pushed: dict[str, Fingerprint] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.lora == "adapter" and pl_module.actor.lora is None:
            raise ValueError("WeightSync has lora=adapter, but model.actor.lora is not set; remove it, or set LoRA.")

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
        lost = engine.weight_version < 0 or self._version < 0
        # Together, as the weights may be gathered from all ranks: those of every rank if one engine wants them.
        flags = torch.tensor([float(stale), float(lost)])
        stale, lost = map(bool, trainer.learner.sharding.over_ranks(flags, "max").tolist())
        if stale:
            self._push(engine, pl_module.actor, version, everything=lost)
        if self.probe:
            names = pl_module.actor.tied_parameters()
            expected = self._pushed | {name: self._pushed[given] for name, given in names.items()}
            _compare_fingerprints(expected, engine.fingerprint(list(expected)), version)
        trainer.log("time/weight_sync_seconds", time.perf_counter() - start)

    def _push(self, engine: Any, actor: Any, version: int, everything: bool) -> None:
        self._version = -1  # until all is there
        merged = self.lora == "merged"
        frozen = actor.frozen_parameters(merged)
        # What was trained until now and is frozen from now on is new once more.
        skip = frozenset() if everything else frozen & self._frozen
        prints = Fingerprints()
        if merged or everything:
            weights = self._recorded(engine, actor.export_parameters(skip, engine.dtype, merged), prints)
            engine.update_weights(weights, version)
            _exhaust(weights)
        if not merged:
            matrices = self._recorded(engine, actor.export_adapter(engine.dtype), prints)
            engine.update_adapter(actor.lora.scaling, matrices, version)
            _exhaust(matrices)
        self._pushed = ({} if everything else self._pushed) | prints.read()
        self._version, self._frozen = version, frozen

    def on_engine_ready(self, trainer: Any, pl_module: Any) -> None:
        """The engine can compute with what was pushed: compare its log-probs.

        Raises:
            StaleWeightsError: they differ by more than the tolerance.
        """
        if self.probe:
            trainer.log("weight_sync/mismatch_nats", self._compare_log_probs(trainer, trainer.rollout.engine))

    def _recorded(
        self, engine: Engine, tensors: Iterator[tuple[str, Tensor]], prints: Fingerprints
    ) -> Iterator[tuple[str, Tensor]]:
        """What is handed over is what is remembered; one tensor is held at a time."""
        for name, tensor in tensors:
            mark()
            if self.probe:
                _record(prints, engine.stored(name, tensor))
            yield name, tensor
            del tensor  # before the next one is made

    @torch.no_grad()
    def _compare_log_probs(self, trainer: Any, engine: Any) -> float:
        """Mean absolute difference of the probe tokens' log-probs, in nats: scored or sampled, whichever is larger."""
        text, model = _probe_prompts(trainer.model), trainer.model
        prompts = text + _with_media(model, text[0].token_ids[:_TOKENS_WITH_MEDIA])
        sampling, seeds = Sampling(max_new_tokens=_PROBE_NEW_TOKENS), [[0] for _ in prompts]
        drawn = [response for (response,) in engine.generate(prompts, sampling, seeds)]
        scored = engine.score([prompt.token_ids for prompt in text])
        readings = model.read(prompts)
        ours = _log_probs(trainer, readings, [one.token_ids for one in drawn])
        # Scores are of all tokens; what is sampled is none of the placeholders of media.
        whole = ours if model.media is None else _log_probs(trainer, readings[: len(text)], [], sampled=False)
        of_text = [row[: len(prompt.token_ids) - 1] for row, prompt in zip(whole, text)]
        of_drawn = [row[len(reading.token_ids) - 1 :] for row, reading in zip(ours, readings)]
        # An engine may give up on a request, and on all of them: what it sampled until then counts.
        differences = {
            "scored": torch.cat(of_text) - torch.cat(scored),
            "sampled": torch.cat(of_drawn) - torch.cat([one.log_probs for one in drawn]),
        }
        return self._accepted({what: float(rows.abs().mean()) for what, rows in differences.items() if len(rows)})

    def _accepted(self, mismatches: dict[str, float]) -> float:
        """The larger one."""
        if self.calibrated is None:
            self.calibrated = max(mismatches.values())
        for what, mismatch in mismatches.items():
            if not mismatch <= self.tolerance:
                raise StaleWeightsError(
                    f"After a weight sync the engine's log-probs of {what} probe tokens differ from the trainer's by "
                    f"{mismatch:.4g} nats on average (tolerance {self.tolerance:.4g}); the weights are in place, so a "
                    "name, a cache or the engine's arithmetic is wrong."
                )
        return max(mismatches.values())

    def state_dict(self) -> dict[str, Any]:
        return {"calibrated": self.calibrated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calibrated = state_dict["calibrated"]


def _record(prints: Fingerprints, stored: dict[str, Tensor]) -> None:
    for name, tensor in stored.items():
        prints.add(name, tensor)


def _exhaust(tensors: Iterator[Any]) -> None:
    """To the last, whatever this rank's engine takes of them: other ranks gather with it."""
    for _ in tensors:
        pass


def _log_probs(
    trainer: Any, readings: list[Reading], continuations: list[Tensor], sampled: bool = True
) -> list[Tensor]:
    """The trainer's, of all tokens of prompts and continuations but each one's first."""
    further = continuations or [torch.zeros(0, dtype=torch.int64)] * len(readings)
    sequences = [torch.cat([reading.token_ids, own]) for reading, own in zip(readings, further)]
    ones = torch.ones(len(sequences), dtype=torch.int64)
    lengths = [len(sequence) - 1 for sequence in sequences]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    packed = pack(sequences, ones, mask, readings).to(trainer.fabric.device)
    actor = trainer.learner.actor.eval()
    found, _ = actor(*packed.inputs, sampled=sampled)
    return list(found.cpu().split(lengths))


def _probe_prompts(model: Any) -> list[Prompt]:
    """The same pseudo-random tokens at every sync: a cache of them that outlived its weights is hit."""
    generator = torch.Generator().manual_seed(0)
    shape = (_PROBE_PROMPTS, min(_PROBE_TOKENS, model.context_tokens - _PROBE_NEW_TOKENS))
    known = torch.arange(len(model.tokenizer))
    # The engine reads media where the processor's tokens stand; the trainer never draws those of the model.
    of_processor = model.media.placeholder_ids if model.media is not None else ()
    placeholders = [*placeholder_ids(model.actor.transformer.config), *of_processor]
    known = known[~torch.isin(known, torch.tensor(placeholders, dtype=torch.int64))]
    ids = known[torch.randint(len(known), shape, generator=generator)]
    return [Prompt(f"probe/{number}", token_ids, text="") for number, token_ids in enumerate(ids)]


def _with_media(model: Any, ids: Tensor) -> list[Prompt]:
    """One with each kind of media that the model takes, within the text ``ids``: the same at every sync, as that is."""
    if model.media is None:
        return []
    return [replace(model.media.example(ids, [kind]), uid=f"probe/{kind}") for kind in sorted(model.media.apart)]


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
