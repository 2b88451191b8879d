"""The default engine: ``transformers``' own ``generate``, in the trainer's process, on weights of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from lightrft.engines.base import EngineError, WakePart
from lightrft.engines.checked import CheckedEngine
from lightrft.engines.skeleton import build
from lightrft.engines.stopping import StopStrings, before_stop, response_length
from lightrft.engines.transformers.adapter import Adapter
from lightrft.engines.transformers.draw import SeededDraw, uniforms, warpers
from lightrft.engines.transformers.prefill import cache_argument, can_share_prefill, shared_prefill
from lightrft.engines.transformers.tensor_parallel import place
from lightrft.engines.transformers.weights import Weights
from lightrft.ops import joined_features
from lightrft.ops.fingerprint import Fingerprint
from lightrft.samples import Prompt, Reading, Response, Sampling
from lightrft.whereabouts import mark

# Logits of a scoring pass held at once: 1 GiB in float32.
_SCORED_LOGITS = 1 << 28


class TransformersEngine(CheckedEngine):
    """Samples with ``model.generate`` of ``transformers``: no extra to install, every architecture it knows.

    Images and audio are read once for the responses of a batch, and encoded for each of them.

    Holds its own copy of the weights. Log-probs are of the distribution a token was drawn from (temperature, min-p,
    top-k and top-p, in this order; a hot first token: FIRE's top-k and temperature), so a greedy token's is 0. The
    vocabulary is the trainer's: ids that pad it beyond the tokenizer stay in the distribution, and decode to nothing.

    Args:
        dtype: what the weights are kept and computed in; ``None`` takes the config's, which is the trainer's.
        sequences_per_batch: most responses generated at once; lower it when memory runs out.
        tensor_parallel_size: contiguous ranks that hold one model together, split by ``transformers``' own plan for the
            architecture; for a model that is too large for one device. It must divide the number of ranks, the heads
            (key and value heads too), the vocabulary and the intermediate size.

    Raises:
        ValueError: an unknown dtype, or a number below 1.
    """

    reads_media = True

    def __init__(
        self,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        sequences_per_batch: int = 256,
        tensor_parallel_size: int = 1,
    ) -> None:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; it must be float32, bfloat16, float16 or null.")
        if sequences_per_batch < 1:
            raise ValueError(f"sequences_per_batch is {sequences_per_batch}; it must be at least 1.")
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size is {tensor_parallel_size}; it must be at least 1.")
        super().__init__()
        self.sequences_per_batch = sequences_per_batch
        self.tensor_parallel_size = tensor_parallel_size
        self._wanted_dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self._model: Any = None

    @property
    def dtype(self) -> torch.dtype | None:
        """As asked for in the constructor; once started, what the model is really in."""
        return self._wanted_dtype if self._model is None else self._model.dtype

    def _start(self, config: Any, tokenizer: Any) -> None:
        model = build(config, self._wanted_dtype, self._device)
        self._weights = Weights(model, place(model, self._group, self._device), self._group)
        self._adapter = Adapter(model)
        self._model = model
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._stop_ids, default=0)
        self._shares_prefill = can_share_prefill(self._model)
        # What the folder recommends (penalties, top-k) would change the distribution behind the trainer's back.
        self._model.generation_config = GenerationConfig()

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        draws = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(len(seeds[prompt]))]
        draws.sort(key=lambda draw: len(prompts[draw[0]].token_ids))
        responses: dict[tuple[int, int], Response] = {}
        for start in range(0, len(draws), self.sequences_per_batch):
            batch = draws[start : start + self.sequences_per_batch]
            unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in batch))}
            row_of = [unique[prompt] for prompt, _ in batch]
            seeds_of = [seeds[prompt][sample] for prompt, sample in batch]
            drawn = self._generate_batch([prompts[prompt] for prompt in unique], row_of, seeds_of, sampling)
            responses.update(zip(batch, drawn))
        return [[responses[i, k] for k in range(len(group))] for i, group in enumerate(seeds)]

    def _score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        scores: dict[int, Tensor] = {}
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        while order:
            longest = len(sequences[order[-1]])
            rows = min(self.sequences_per_batch, max(1, _SCORED_LOGITS // (longest * self._vocabulary)))
            batch, order = order[-rows:], order[:-rows]
            scores.update(zip(batch, self._score_batch([sequences[index] for index in batch])))
        return [scores[index] for index in range(len(sequences))]

    def _push(self, tensors: Iterable[tuple[str, Tensor]], complete: bool) -> None:
        self._adapter.remove()
        self._weights.push(tensors, complete)

    def _push_adapter(self, scaling: float, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self._group.size > 1:
            raise EngineError(
                f"TransformersEngine over {self._group.size} ranks takes no adapters; set WeightSync's lora to merged, "
                "or tensor_parallel_size to 1."
            )
        self._adapter.push(scaling, tensors)

    def _fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        return self._weights.fingerprint(names, self._adapter.matrices)

    def _sleep(self, level: int) -> None:
        if level == 1:
            self._weights.offload()
            self._adapter.move(torch.device("cpu"))
        else:
            self._weights.drop()
            self._adapter.remove()
        self._release()

    def _wake(self, part: WakePart) -> None:
        if part == "weights":
            self._weights.restore()
            self._adapter.move(self._device)

    def _close(self) -> None:
        del self._model, self._weights, self._adapter
        self._model = None
        self._release()

    @property
    def _vocabulary(self) -> int:
        return int(self._model.get_input_embeddings().num_embeddings)

    def _release(self) -> None:
        # The allocator keeps freed memory for this process; the trainer's next phase may want it in other sizes.
        if self._device.type != "cpu":
            torch.get_device_module(self._device).empty_cache()

    def _generate_batch(
        self, prompts: Sequence[Prompt], row_of: Sequence[int], seeds: Sequence[int], sampling: Sampling
    ) -> list[Response]:
        """One response per entry of ``row_of``, the index of its prompt."""
        strings, stop_ids = self._split_stops(sampling)
        readings = [self._read(prompt, sampling) for prompt in prompts]
        token_ids, mask = self._left_pad([reading.token_ids for reading in readings])
        rows = torch.tensor(row_of, device=self._device)
        length = token_ids.shape[1]
        draw = SeededDraw(uniforms(seeds, sampling.max_new_tokens).to(self._device), length, self._group)
        stopping = StopStrings(strings, stop_ids, len(row_of), self._detokenizer) if strings else None
        with self._computing():
            shared: dict[str, Any] = {}
            if self._shares_prefill and len(prompts) < len(row_of) and length > 1:
                shared[cache_argument(self._model)] = shared_prefill(self._model, token_ids, mask, rows)
            output = self._model.generate(
                input_ids=token_ids[rows],
                attention_mask=mask[rows],
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=sorted(stop_ids) or None,
                    pad_token_id=self._pad_id,
                ),
                logits_processor=LogitsProcessorList([*warpers(sampling, length, self._never_drawn), draw]),
                stopping_criteria=StoppingCriteriaList([stopping] if stopping else []),
                synced_gpus=False,
                **shared,
                **self._media_inputs(readings, row_of, length),
            )
        ends = stopping.ends if stopping else {}
        drawn = zip(output[:, length:].cpu(), draw.log_probs.cpu(), row_of, seeds)
        return [
            self._response(prompts[prompt], tokens, log_probs, ends.get(row), stop_ids, strings, seed)
            for row, (tokens, log_probs, prompt, seed) in enumerate(drawn)
        ]

    def _response(
        self,
        prompt: Prompt,
        tokens: Tensor,
        log_probs: Tensor,
        end: int | None,
        stop_ids: frozenset[int],
        strings: Sequence[str],
        seed: int,
    ) -> Response:
        ids = tokens.tolist()[:end]
        ids = ids[: response_length(ids, stop_ids)]
        log_probs = log_probs[: len(ids)].clone()
        if not bool(log_probs.isfinite().all()):
            raise EngineError(
                f"The model's logits for prompt {prompt.uid!r} are not finite under weights of version "
                f"{self.weight_version}; training has diverged, or {self.dtype} is too narrow."
            )
        return Response(
            token_ids=torch.tensor(ids, dtype=torch.int64),
            log_probs=log_probs,
            text=before_stop(self._detokenizer.decode(ids), strings),
            finish_reason="stop" if end is not None or ids[-1] in stop_ids else "length",
            weight_version=self.weight_version,
            seed=seed,
        )

    def _read(self, prompt: Prompt, sampling: Sampling) -> Reading:
        if self._media is None:
            return Reading(prompt.token_ids)
        reading = self._media.read(prompt)
        if hasattr(self._model.base_model, "get_rope_index") and int(reading.token_ids[-1]) in self._never_drawn:
            raise EngineError(
                f"Prompt {prompt.uid!r} ends in an image or video, where transformers' generate goes on from a wrong "
                "position; let it end in text, as chat templates do."
            )
        self._check_length(len(reading.token_ids), f"Prompt {prompt.uid!r}", sampling.max_new_tokens)
        return reading

    def _media_inputs(self, readings: Sequence[Reading], row_of: Sequence[int], length: int) -> dict[str, Tensor]:
        """What the model takes beside the tokens of the rows, each padded on its left to ``length``."""
        rows = [readings[prompt] for prompt in row_of]
        inputs = joined_features(item for row in rows for item in row.items)
        for name in {name for row in rows for name in row.token_types}:
            inputs[name] = torch.zeros(len(rows), length, dtype=torch.int64)
            for own, row in zip(inputs[name], rows):
                if name in row.token_types:
                    own[-len(row.token_ids) :] = row.token_types[name]
        return {
            name: tensor.to(self._device, self._model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in inputs.items()
        }

    def _left_pad(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        shape = (len(prompts), max(map(len, prompts)))
        token_ids = torch.full(shape, self._pad_id, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            token_ids[row, -len(prompt) :] = prompt
            mask[row, -len(prompt) :] = 1
        return token_ids.to(self._device), mask.to(self._device)

    def _score_batch(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        # Padded on the right, where causal models need no mask: what follows a token does not reach it.
        padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=self._pad_id)
        token_ids = padded.to(self._device)
        mark()
        with self._computing():
            logits = self._model(input_ids=token_ids, use_cache=False).logits
            return [
                _log_probs(row[: len(sequence) - 1], ids[1 : len(sequence)]).cpu()
                for row, ids, sequence in zip(logits, token_ids, sequences)
            ]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        # The engine's dtype is its own, whatever precision plugin is around.
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            yield


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of int64 ``targets`` ``[L]`` under ``logits`` ``[L, V]``: float32 ``[L]``, in pieces for memory."""
    pieces = zip(logits.split(1024), targets.split(1024))
    return torch.cat([part.float().log_softmax(-1).gather(1, ids[:, None])[:, 0] for part, ids in pieces])
