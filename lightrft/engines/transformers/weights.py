"""The weights of an in-process engine: pushed by name, fingerprinted, moved to host memory, dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightrft.engines.group import EngineGroup
from lightrft.engines.manifest import Manifest
from lightrft.ops.fingerprint import Fingerprint, Fingerprints, joined
from lightrft.ops.shard import Shard


class Weights:
    """Parameters and persistent buffers of ``model``, named as in its ``state_dict``; tied ones are one weight.

    Args:
        model: on the device it computes on.
        shards: which part of its whole each of the model's tensors is that is split over ``group``.
        group: the ranks that hold the model together.
    """

    def __init__(self, model: nn.Module, shards: Mapping[Tensor, Shard], group: EngineGroup) -> None:
        self._shards, self._group = shards, group
        self._manifest = Manifest(model, shards)
        self._placed = {id(weight): (weight, weight.shape, weight.device) for weight in self._manifest.named.values()}

    def push(self, tensors: Iterable[tuple[str, Tensor]], complete: bool) -> None:
        """Copy ``tensors`` in, cast to each weight's dtype; of a split weight this rank's part.

        Args:
            tensors: name and whole tensor, one after the other.
            complete: whether every weight must be among them.

        Raises:
            EngineError: as :meth:`~lightrft.engines.manifest.Manifest.checked`.
        """
        for name, tensor in self._manifest.checked(tensors, complete):
            weight = self._manifest.find(name)
            shard = self._shards.get(weight)
            with torch.no_grad():
                weight.copy_(shard.of(tensor) if shard else tensor)
            del tensor  # before the next one is made

    def fingerprint(self, names: Sequence[str], further: Mapping[str, Tensor]) -> dict[str, Fingerprint]:
        """Fingerprints by name; of a split weight the whole's, to which every rank of the group gives its part.

        Args:
            names: of weights and of ``further`` tensors.
            further: by name.

        Raises:
            EngineError: an unknown name.
        """
        found = {name: further[name] if name in further else self._manifest.find(name) for name in names}
        taken = Fingerprints()
        for name, weight in found.items():
            taken.add(name, weight, self._shards.get(weight))
        prints = taken.read()
        split = {name for name, weight in found.items() if weight in self._shards}
        everyones = self._group.everyone({name: prints[name] for name in split})
        return prints | {name: joined(part[name] for part in everyones) for name in split}

    def offload(self) -> None:
        """Move to host memory."""
        self._move(lambda weight: weight.data.cpu())

    def drop(self) -> None:
        """Free the memory; the values are lost."""
        self._move(lambda weight: torch.empty(0, dtype=weight.dtype, device=weight.device))

    def restore(self) -> None:
        """Back onto the device: offloaded weights with their values, dropped ones with none."""
        for weight, shape, device in self._placed.values():
            if weight.shape == shape:
                weight.data = weight.data.to(device)
            else:
                weight.data = torch.empty(shape, dtype=weight.dtype, device=device)

    def _move(self, moved: Callable[[Tensor], Tensor]) -> None:
        # Through .data: the parameter objects stay the same, so that tied weights stay tied.
        for weight, _, _ in self._placed.values():
            weight.data = moved(weight)
