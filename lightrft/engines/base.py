"""What every inference engine offers; :class:`Engine` is selected by ``class_path`` in YAML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightrft.engines.float8 import per_row
from lightrft.ops.fingerprint import Fingerprint
from lightrft.samples import Prompt, Response, Sampling

if TYPE_CHECKING:
    from lightrft.engines.group import EngineGroup

WakePart = Literal["weights", "cache"]


class EngineError(RuntimeError):
    """The engine cannot go on: dead, asleep, or given what it cannot serve. The message says which and what to do."""


class Engine:
    """An inference engine that samples responses with weights pushed from the trainer.

    The constructor is cheap (it runs in every process before ranks exist); :meth:`start` builds the model. A started
    engine holds *no* usable weights until the first :meth:`update_weights`.

    An engine may lie over several ranks (:class:`~lightrft.engines.EngineGroup`). Each of them has an object of this
    class, and every method is then collective: all ranks of the group call it, in the same order and with the same
    arguments, and each gets the whole result.

    Attributes:
        tensor_parallel_size: ranks that hold the engine together.
        dropped: weights that it does not compute with, as of layers whose outputs the model leaves unused. They are
            pushed like all others, and not kept.
        in_float8: weights that it keeps in 8 bits (:mod:`lightrft.engines.float8`), each with the scales of its rows as
            ``<name>_scale``; known once it is started.
        weight_version: version of the last complete :meth:`update_weights`; -1 before the first.
        in_own_process: whether it computes in another process, so that one thread may wait in :meth:`generate` while
            others compute here.
    """

    in_own_process: bool = False
    tensor_parallel_size: int = 1
    in_float8: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    weight_version: int = -1

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype the engine computes in; pushed tensors are cast to it. ``None`` keeps the trainer's."""
        return None

    def start(self, config: Any, tokenizer: Any, device: torch.device, group: EngineGroup | None = None) -> None:
        """Build the model from a ``transformers`` config.

        Args:
            config: ``PretrainedConfig`` of the actor.
            tokenizer: ``PreTrainedTokenizerBase`` of the actor (end of sequence, padding, decoding), or the
                ``ProcessorMixin`` around it where prompts have media.
            device: where this rank computes.
            group: the ``tensor_parallel_size`` ranks that hold the engine; ``None`` is this rank alone.

        Raises:
            EngineError: the model cannot be served, or not by a group of that size; says why.
        """
        raise NotImplementedError

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        """Sample ``len(seeds[i])`` responses to ``prompts[i]``, in order; there may be no prompts, or no seeds.

        Each response is drawn from its own seed: it does not depend on the batch it is in.

        Raises:
            EngineError: asleep, closed, or without weights.
            ValueError: a prompt without tokens, too long for the model's context, or with media that cannot be used
                (:class:`~lightrft.media.MediaError`); names it.
        """
        raise NotImplementedError

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Untruncated log-probs at temperature 1 of tokens 1.. of each int64 ``[L]`` sequence: float32 ``[L - 1]``.

        There may be no sequences.
        """
        raise NotImplementedError

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights, names as in the actor's ``transformers`` model, each whole. Caches of old ones are dropped.

        They come one at a time and should be taken so. The first push brings all, and so does one to an engine whose
        weights are unusable; later ones may leave out weights that did not change, siblings that an engine fuses
        (queries, keys and values) all together. Tied weights come once. An adapter is taken off.

        Raises:
            EngineError: an unknown name, a wrong shape; names it. The weights are then unusable until a full push.
        """
        raise NotImplementedError

    def update_adapter(self, scaling: float, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Compute with the weights as pushed plus a low-rank adapter: ``W + scaling * B @ A`` (arXiv 2106.09685).

        Takes the place of an earlier adapter. Caches are dropped. Engines without adapters leave this as it is.

        Args:
            scaling: LoRA's ``alpha / rank``.
            tensors: ``<layer>.lora_A.weight`` ``[rank, inputs]`` and ``<layer>.lora_B.weight`` ``[outputs, rank]`` of
                each layer that is adapted, layers named as in the actor's ``transformers`` model, in any order.
            version: of the weights with the adapter.

        Raises:
            EngineError: a layer that is unknown or cannot be adapted, a matrix that is missing or of a wrong shape;
                names it.
        """
        raise EngineError(f"{type(self).__name__} takes no adapters; set WeightSync's lora to merged.")

    def fingerprint(self, names: Sequence[str]) -> dict[str, Fingerprint]:
        """Fingerprints, computed inside the engine, of the weights it computes with; of whole tensors.

        Args:
            names: of weights and of an adapter's matrices, as they were pushed. Of tied weights any of their names:
                each gives what the engine computes with there.
        """
        raise NotImplementedError

    def stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What the engine keeps of ``tensor``, which is in its dtype, by the names of :meth:`fingerprint`."""
        if name in self.dropped:
            return {}
        if name not in self.in_float8:
            return {name: tensor}
        weight, scale = per_row(tensor)
        return {name: weight, f"{name}_scale": scale}

    def sleep(self, level: int = 1) -> None:
        """Free device memory: 1 keeps the weights in host memory, 2 drops them (a push must follow waking)."""
        raise NotImplementedError

    def wake(self, parts: Sequence[WakePart] = ("weights", "cache")) -> None:
        """Take device memory again, part by part, so that peak memory stays that of one phase."""
        raise NotImplementedError

    def close(self) -> None:
        """Free everything; only :meth:`start` makes the engine usable again. Closing twice is allowed."""
        raise NotImplementedError
