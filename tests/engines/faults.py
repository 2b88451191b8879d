"""Engines that go wrong without a word, in the ways real ones were seen to: each is put around any other engine.

``FAULTS`` are those that the probe of a weight sync must catch. The first push goes right, as at the start of a run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightrft.engines import Engine
from lightrft.ops import Fingerprint
from lightrft.samples import Prompt, Response, Sampling

Named = Iterable[tuple[str, Tensor]]


class Around(Engine):
    """Hands everything on to ``engine``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tensor_parallel_size = engine.tensor_parallel_size

    @property
    def weight_version(self) -> int:  # type: ignore[override]
        return self.engine.weight_version

    @property
    def dtype(self) -> torch.dtype | None:
        return self.engine.dtype

    @property
    def in_float8(self) -> frozenset[str]:  # type: ignore[override]
        return self.engine.in_float8

    def start(self, *args: Any) -> None:
        self.engine.start(*args)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        return self.engine.generate(prompts, sampling, seeds)

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        return self.engine.score(sequences)

    def update_weights(self, tensors: Named, version: int) -> None:
        self.engine.update_weights(tensors, version)

    def update_adapter(self, scaling: float, tensors: Named, version: int) -> None:
        self.engine.update_adapter(scaling, tensors, version)

    def fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        return self.engine.fingerprint(names)

    def sleep(self, level: int = 1) -> None:
        self.engine.sleep(level)

    def wake(self, parts: Any = ("weights", "cache")) -> None:
        self.engine.wake(parts)

    def close(self) -> None:
        self.engine.close()


class _Losing(Around):
    """Of later pushes only what :meth:`arrives` lets through reaches the engine."""

    def update_weights(self, tensors: Named, version: int) -> None:
        first = self.weight_version < 0
        super().update_weights(((name, one) for name, one in tensors if first or self.arrives(name)), version)

    def arrives(self, name: str) -> bool:
        raise NotImplementedError


class SkippedUpdate(_Losing):
    """A push that is acknowledged and not done."""

    def arrives(self, name: str) -> bool:
        return False


class OneShardAlone(_Losing):
    """Of the fused layer of queries, keys and values the queries alone."""

    def arrives(self, name: str) -> bool:
        return not any(shard in name for shard in ("k_proj", "v_proj"))


class OldHead(Around):
    """A head tied to the embedding in the trainer, kept apart here: later pushes do not name it."""

    def start(self, config: Any, *args: Any) -> None:
        config = copy.deepcopy(config)
        assert config.get_text_config().tie_word_embeddings
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
        super().start(config, *args)

    def update_weights(self, tensors: Named, version: int) -> None:
        super().update_weights(self._with_head(tensors) if self.weight_version < 0 else tensors, version)

    def _with_head(self, tensors: Named) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            yield name, tensor
            if name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", tensor


class UnknownNames(_Losing):
    """Names that the engine has none of are passed over: those of MLPs, which it calls otherwise."""

    def arrives(self, name: str) -> bool:
        return ".mlp." not in name

    def fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        return super().fingerprint([name for name in names if self.arrives(name)])


class StaleScores(Around):
    """Scores come from a cache that outlives the weights."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.cache: dict[tuple[int, ...], Tensor] = {}

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        keys = [tuple(sequence.tolist()) for sequence in sequences]
        for key, values in zip(keys, super().score(sequences)):
            self.cache.setdefault(key, values)
        return [self.cache[key] for key in keys]


class StalePrefixes(Around):
    """What is sampled after a prompt comes from a cache of the prompt that outlives the weights; scores do not."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.cache: dict[Any, Response] = {}

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        groups = super().generate(prompts, sampling, seeds)
        return [
            [self._cached((tuple(prompt.token_ids.tolist()), sampling), response) for response in group]
            for prompt, group in zip(prompts, groups)
        ]

    def _cached(self, key: Any, response: Response) -> Response:
        old = self.cache.setdefault((*key, response.seed), response)
        return replace(old, weight_version=self.weight_version)


class LostInDeepSleep(Around):
    """Wakes from level 2 with zeros, and says that it holds what it held."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.shapes: dict[str, torch.Size] = {}
        self.claimed = -1

    @property
    def weight_version(self) -> int:  # type: ignore[override]
        return self.claimed

    def update_weights(self, tensors: Named, version: int) -> None:
        super().update_weights(self._remembered(tensors), version)
        self.claimed = version

    def _remembered(self, tensors: Named) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self.shapes[name] = tensor.shape
            yield name, tensor

    def wake(self, parts: Any = ("weights", "cache")) -> None:
        super().wake(parts)
        if self.engine.weight_version < 0 <= self.claimed and "weights" in parts:
            zeros = ((name, torch.zeros(shape, dtype=self.dtype)) for name, shape in self.shapes.items())
            self.engine.update_weights(zeros, self.claimed)


@dataclass(frozen=True)
class Fault:
    """One way to go wrong, and how the probe must say so.

    Attributes:
        kind: goes around an engine.
        says: what the error matches.
        step: learning rate of the one step between two syncs; large where log-probs must show it.
        level: of sleep between them.
        resynced: the engine is woken again before there are newer weights.
    """

    kind: type[Around]
    says: str
    step: float = 1e-6
    level: int = 1
    resynced: bool = False


FAULTS = [
    Fault(SkippedUpdate, r"not hold the weights of version 1: .* first model\.embed_tokens\.weight "),
    Fault(OneShardAlone, r"not hold the weights of version 1: .* first model\.layers\.0\.self_attn\.k_proj\.weight "),
    Fault(OldHead, r"not hold the weights of version 1: 1 of .* first lm_head\.weight "),
    Fault(
        UnknownNames, r"not hold the weights of version 0: .* first model\.layers\.0\.mlp\.\S+ \(the engine does not"
    ),
    Fault(LostInDeepSleep, "not hold the weights of version 0", level=2, resynced=True),
    Fault(StaleScores, "log-probs of scored probe tokens differ", step=1e-2),
    Fault(StalePrefixes, "log-probs of sampled probe tokens differ", step=1e-2),
]
