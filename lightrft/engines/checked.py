"""What engines on this machine have in common: their states, and the checks of what they are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lightrft.engines.base import Engine, EngineError, WakePart
from lightrft.engines.group import EngineGroup
from lightrft.engines.stopping import Detokenizer
from lightrft.media import MediaProcessor, placeholder_ids
from lightrft.ops.fingerprint import Fingerprint
from lightrft.samples import Prompt, Response, Sampling


class CheckedEngine(Engine):
    """Keeps the order of calls and refuses bad input; subclasses do the work in the methods that begin with ``_``.

    Attributes:
        reads_media: whether prompts may bring images or audio, where the model has a processor for them.
    """

    reads_media: bool = False

    def __init__(self) -> None:
        self._started = False
        self._closed = False
        self._asleep: set[WakePart] = set()

    def start(self, config: Any, tokenizer: Any, device: torch.device, group: EngineGroup | None = None) -> None:
        name = type(self).__name__
        if self._started:
            raise EngineError(f"{name} is started; close it before it starts anew.")
        self._group = group or EngineGroup()
        if self._group.size != self.tensor_parallel_size:
            raise EngineError(
                f"{name} has tensor_parallel_size={self.tensor_parallel_size}, but was started on a group "
                f"of {self._group.size}; pass EngineGroup({self.tensor_parallel_size})."
            )
        self._never_drawn = placeholder_ids(config)
        if self._never_drawn and not self.reads_media:
            raise EngineError(f"{name} does not serve models that read media; choose an engine that does.")
        self._closed, self._asleep = False, set()
        self._device = torch.device(device)
        self._processor = tokenizer
        self._media = MediaProcessor.of(tokenizer) if self.reads_media else None
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its own
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_ids = _stop_ids(config, tokenizer)
        self._context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._start(config, tokenizer)
        self._started = True

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        self._require("weights", "cache")
        self._require_pushed()
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} lists of seeds; give one list per prompt.")
        for prompt in prompts:
            self._check_media(prompt)
            self._check_ids(prompt.token_ids, f"Prompt {prompt.uid!r}", sampling.max_new_tokens)
        return self._generate(prompts, sampling, seeds)

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        self._require("weights", "cache")
        self._require_pushed()
        for index, sequence in enumerate(sequences):
            self._check_ids(sequence, f"sequence {index}", 0)
        return self._score(sequences)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._require("weights")
        usable, self.weight_version = self.weight_version >= 0, -1
        self._push(tensors, complete=not usable)
        self.weight_version = version

    def update_adapter(self, scaling: float, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._require("weights")
        self._require_pushed()
        self.weight_version = -1
        self._push_adapter(scaling, tensors)
        self.weight_version = version

    def fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        self._require("weights")
        return self._fingerprint(names)

    def sleep(self, level: int = 1) -> None:
        if level not in (1, 2):
            raise ValueError(f"level is {level!r}; it must be 1 (weights to host memory) or 2 (weights dropped).")
        self._require()
        self._sleep(level)
        self._asleep = {"weights", "cache"}
        if level == 2:
            self.weight_version = -1

    def wake(self, parts: Sequence[WakePart] = ("weights", "cache")) -> None:
        unknown = set(parts) - {"weights", "cache"}
        if unknown:
            raise ValueError(f"{min(unknown)!r} is no part of an engine; wake 'weights', 'cache' or both.")
        self._require()
        for part in parts:
            if part in self._asleep:
                self._wake(part)
                self._asleep.remove(part)

    def close(self) -> None:
        if self._started:
            self._started = False
            self._close()
        self._closed = True
        self.weight_version = -1

    def _start(self, config: Any, tokenizer: Any) -> None:
        raise NotImplementedError

    @property
    def _vocabulary(self) -> int:
        """Ids that the model embeds."""
        raise NotImplementedError

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        raise NotImplementedError

    def _score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def _push(self, tensors: Iterable[tuple[str, Tensor]], complete: bool) -> None:
        raise NotImplementedError

    def _push_adapter(self, scaling: float, tensors: Iterable[tuple[str, Tensor]]) -> None:
        raise EngineError(f"{type(self).__name__} takes no adapters; set WeightSync's lora to merged.")

    def _fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        raise NotImplementedError

    def _sleep(self, level: int) -> None:
        raise NotImplementedError

    def _wake(self, part: WakePart) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def _require(self, *parts: WakePart) -> None:
        if not self._started:
            name = type(self).__name__
            raise EngineError(
                f"{name} is closed; start() it anew." if self._closed else "Call start() on the engine first."
            )
        asleep = [part for part in parts if part in self._asleep]
        if asleep:
            raise EngineError(f"The engine's {' and '.join(asleep)} are asleep; call wake({asleep}) first.")

    def _require_pushed(self) -> None:
        if self.weight_version < 0:
            raise EngineError("The engine has no usable weights; push all of them with update_weights() first.")

    def _check_ids(self, token_ids: Tensor, name: str, new_tokens: int) -> None:
        if len(token_ids) == 0:
            raise ValueError(f"{name} has no tokens; an engine needs at least one.")
        # Inside the model this would be an index error, on a GPU the end of the process.
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self._vocabulary:
            raise ValueError(f"{name} has token ids outside [0, {self._vocabulary}); use the actor's own tokenizer.")
        self._check_length(len(token_ids), name, new_tokens)

    def _check_length(self, tokens: int, name: str, new_tokens: int) -> None:
        if self._context is not None and tokens + new_tokens > self._context:
            raise ValueError(
                f"{name} has {tokens} tokens; with max_new_tokens {new_tokens} that is more than the model's "
                f"context of {self._context}; shorten either."
            )

    def _check_media(self, prompt: Prompt) -> None:
        if self._media is not None:
            self._media.check(prompt)
        elif prompt.media:
            cure = "start it with the model's processor" if self.reads_media else "choose an engine that does"
            raise ValueError(
                f"Prompt {prompt.uid!r} has images, audio or video, which {type(self).__name__} does not read; {cure}."
            )

    def _split_stops(self, sampling: Sampling) -> tuple[list[str], frozenset[int]]:
        """Stop strings, and every id that stops.

        Strings that are special tokens never reach the text, and stop by their ids.
        """
        ids = {stop: self._detokenizer.special_id(stop) for stop in sampling.stop}
        special = frozenset(i for i in ids.values() if i is not None)
        return [stop for stop in ids if ids[stop] is None], self._stop_ids | special | set(sampling.stop_token_ids)


def _stop_ids(config: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End of sequence by the tokenizer, the model's config and what it generates by default."""
    text = config.get_text_config()
    found: set[int] = set()
    for source in (tokenizer, GenerationConfig.from_model_config(config), config, text):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return frozenset(found)
