"""Names of weights towards vLLM: tied ones under each of theirs, and none without what vLLM holds as one with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from lightrft.engines.base import EngineError
from lightrft.engines.manifest import Manifest
from lightrft.whereabouts import mark


class VLLMManifest(Manifest):
    """The weights of ``model``, as vLLM wants them.

    Attributes:
        names: what vLLM calls each weight, by its name in memory; known once it holds the model, like the next.
        together: by name, what vLLM holds as one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.names: Mapping[str, str] = {name: name for name in self.named}
        self.together: Mapping[str, Sequence[str]] = {}

    def whole_layers(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass ``tensors`` on under every name that each has, and refuse a part of what a layer holds as one.

        vLLM would keep the old head of tied weights on the CPU, and fill the rest of the layer with anything.

        Args:
            tensors: as :meth:`checked` passes them on.

        Raises:
            EngineError: after the last, for such a part; names it and what it lacks.
        """
        seen: set[str] = set()
        for name, tensor in tensors:
            mark()
            seen.add(name)
            for one in self.tied(name):
                yield self.names[one], tensor
        for name in seen:
            lacking = [other for other in self.together.get(name, []) if other not in seen]
            if lacking:
                raise EngineError(f"{name!r} was pushed without {lacking[0]!r}, which vLLM holds as one with it.")

    def held(self, names: Sequence[str]) -> dict[str, str]:
        """What vLLM calls each of ``names``: of a weight or, with ``_scale`` behind it, of the scales of one in 8 bits.

        Raises:
            EngineError: there is no weight of that name.
        """
        found = {}
        for name in names:
            weight = name.removesuffix("_scale")  # scales are no weight of the actor's
            self.find(weight)
            found[name] = self.names[weight] + name[len(weight) :]
        return found
