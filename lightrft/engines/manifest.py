"""Which weights an engine takes: names, shapes, and which names are one weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from lightrft.engines.base import EngineError
from lightrft.ops.shard import Shard


class Manifest:
    """Parameters and persistent buffers of ``model``, named as in its ``state_dict``; tied ones are one weight.

    Args:
        model: with parameters or, as :func:`lightrft.engines.skeleton.build` makes it, without.
        shards: which part of its whole each of the model's tensors is that is split over ranks.

    Attributes:
        named: tensor by name.
    """

    def __init__(self, model: nn.Module, shards: Mapping[Tensor, Shard] | None = None) -> None:
        self._shards = shards or {}
        state = model.state_dict(keep_vars=True)
        self.named: dict[str, Tensor] = {name: item for name, item in state.items() if isinstance(item, Tensor)}

    def find(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            EngineError: there is none.
        """
        if name not in self.named:
            raise EngineError(f"The engine has no weight named {name!r}; push names as in the actor's own model.")
        return self.named[name]

    def tied(self, name: str) -> list[str]:
        """Every name of the weight that ``name`` is one of.

        Raises:
            EngineError: there is none of that name.
        """
        weight = self.find(name)
        return [other for other, one in self.named.items() if one is weight]

    def checked(self, tensors: Iterable[tuple[str, Tensor]], complete: bool) -> Iterator[tuple[str, Tensor]]:
        """Pass ``tensors`` on, one after the other.

        Args:
            tensors: name and whole tensor.
            complete: whether every weight must be among them.

        Raises:
            EngineError: an unknown name, a wrong shape, or after the last a weight that is missing; names it.
        """
        seen: set[int] = set()
        for name, tensor in tensors:
            weight = self.find(name)
            shard = self._shards.get(weight)
            shape = shard.whole if shard else tuple(weight.shape)
            if shape != tuple(tensor.shape):
                raise EngineError(
                    f"Weight {name!r} was pushed with shape {tuple(tensor.shape)}, but the engine's is "
                    f"{shape}; start the engine from the actor's own config."
                )
            yield name, tensor
            del tensor  # before the next one is made
            seen.add(id(weight))
        missing = [name for name, weight in self.named.items() if id(weight) not in seen] if complete else []
        if missing:
            raise EngineError(
                f"{len(missing)} weights were not pushed, {missing[0]!r} the first; the first push, and the one after "
                "weights became unusable, must bring every weight, frozen ones too."
            )
