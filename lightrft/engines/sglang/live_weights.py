"""Weights of a model whose own loader puts them into place: fused, split over ranks, under names of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightrft.engines.base import EngineError
from lightrft.engines.float8 import per_row
from lightrft.engines.sglang.float8_layers import InRows, loadable
from lightrft.ops.fingerprint import Fingerprint, Fingerprints, joined


@dataclass(frozen=True)
class Region:
    """Which elements of a whole, contiguous tensor a part of it is, as strides say it.

    Attributes:
        whole: shape of the whole tensor.
        shape: of the part.
        strides: between the part's elements, counted in elements of the whole.
        start: where in the flattened whole the part begins.
    """

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def positions(self, local: Tensor) -> Tensor:
        """Where elements lie in the flattened whole; int64 ``local`` is where they lie in the flattened part."""
        found = torch.full_like(local, self.start)
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            found += local % size * stride
            local = local // size
        return found


class Held(NamedTuple):
    """What one rank holds of a weight: which part, and the part's fingerprint."""

    region: Region
    print: Fingerprint


class LiveWeights:
    """Loads tensors by ``model.load_weights`` and watches where it copies them to: those are what it computes with.

    A weight of a layer in 8 bits is quantised before, whole, so that its rows have the same scales on all ranks.

    Args:
        model: whose ``load_weights`` takes pairs of name and tensor, copies what it knows, and may say nothing of the
            rest.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._places: dict[str, list[tuple[Tensor, Region]]] = {}
        self._called: dict[str, str] = {}
        self._in_float8: frozenset[str] = frozenset()

    @torch.no_grad()
    def find_float8(self, shapes: Mapping[str, tuple[Sequence[str], Sequence[int]]]) -> frozenset[str]:
        """Which weights the model keeps in 8 bits; to be asked before they are loaded.

        Args:
            shapes: of whole tensors, each with what it may be called, by its name for :meth:`held`.
        """
        found = set()
        asked = torch.zeros((), dtype=torch.float8_e4m3fn, device=next(self._model.parameters()).device)
        with loadable(self._model) as layers:
            for own, (names, shape) in shapes.items():
                with suppress(EngineError):  # what it cannot take is said when it is pushed
                    _, copies = self._taken(own, _from_last(names), asked.expand(tuple(shape)), dry=True)
                    if any(target.untyped_storage()._cdata in layers for target, _ in copies):
                        found.add(own)
        self._in_float8 = frozenset(found)
        return self._in_float8

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[Sequence[str], Tensor]]) -> None:
        """Take whole tensors.

        Args:
            tensors: each with what it may be called: first its name for :meth:`held`, which is tried last.

        Raises:
            EngineError: one of which nothing was copied into the model, or that it refused; names it.
        """
        with loadable(self._model) as layers:
            for names, tensor in tensors:
                own = names[0]
                tried = [self._called[own]] if own in self._called else _from_last(names)
                if own not in self._in_float8:
                    self._called[own], self._places[own] = self._taken(own, tried, tensor)
                    continue
                weight, scale = per_row(tensor)
                self._called[own], self._places[own] = self._taken(own, tried, weight)
                self._places[f"{own}_scale"] = [_scaled(layers, scale, *place) for place in self._places[own]]

    def _taken(
        self, own: str, tried: Sequence[str], tensor: Tensor, dry: bool = False
    ) -> tuple[str, list[tuple[Tensor, Region]]]:
        """The first of the names under which the model takes it, and where to; ``dry`` only looks."""
        model, failure = type(self._model).__name__, None
        for name in tried:
            copies = _Copies(tensor, dry)
            try:
                with copies:
                    self._model.load_weights([(name, tensor)])
            except Exception as error:
                failure = failure or error
                continue
            if copies.made:
                return name, copies.made
        if failure is not None:
            raise EngineError(f"{model} cannot take {own!r}: {failure!r}") from failure
        raise EngineError(f"{model} has no place for a weight named {own!r}.")

    def held(self, names: Sequence[str]) -> dict[str, list[Held]]:
        """What this rank's model holds now of weights that were loaded.

        Raises:
            EngineError: one that never was.
        """
        missing = [name for name in names if name not in self._places]
        if missing:
            raise EngineError(f"{missing[0]!r} has not been pushed, so the engine does not hold it.")
        taken = Fingerprints()
        for name in names:
            for part, (place, region) in enumerate(self._places[name]):
                # A fingerprint asks of a shard only where its elements lie in the whole.
                taken.add(f"{part} of {name}", place, None if region.shape == region.whole else cast(Any, region))
        prints = taken.read()
        return {
            name: [Held(region, prints[f"{part} of {name}"]) for part, (_, region) in enumerate(self._places[name])]
            for name in names
        }


def whole_fingerprint(parts: Sequence[Held]) -> Fingerprint:
    """Of the weight that the parts of all ranks make up.

    A part may be there several times. If such copies differ, all of them count, and the fingerprint is no tensor's.
    """
    distinct = {(part.region, part.print) for part in parts}
    return joined(one for _, one in sorted(distinct, key=lambda pair: (pair[0].start, pair[1].checksum)))


def _from_last(names: Sequence[str]) -> list[str]:
    """The first name is tried after all others."""
    return [*names[1:], names[0]]


def _scaled(layers: Mapping[int, InRows], scale: Tensor, target: Tensor, region: Region) -> tuple[Tensor, Region]:
    """Put the scales of rows that were copied to ``target`` beside them; where to, and which of all they are."""
    layer = layers[target.untyped_storage()._cdata]
    width = layer.loads.shape[1]
    start = (int(target.storage_offset()) - int(layer.loads.storage_offset())) // width
    place, first = layer.scale[start : start + len(target)], region.start // region.whole[1]
    place.copy_(scale[first : first + len(target)])
    return place, Region(tuple(scale.shape), (len(target),), (1,), first)


class _Copies(TorchDispatchMode):
    """Sees every copy out of a tensor's memory; ``dry`` ones are not made.

    Attributes:
        made: where to, and which part of the tensor.
    """

    def __init__(self, source: Tensor, dry: bool = False) -> None:
        super().__init__()
        self._source, self._dry = source, dry
        self.made: list[tuple[Tensor, Region]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            target, source = args[0], args[1]
            if source.untyped_storage()._cdata == self._source.untyped_storage()._cdata:
                self.made.append((target, self._region(source)))
                if self._dry:
                    return target
        return function(*args, **(kwargs or {}))

    def _region(self, part: Tensor) -> Region:
        start = int(part.storage_offset()) - int(self._source.storage_offset())
        return Region(tuple(self._source.shape), tuple(part.shape), tuple(part.stride()), start)
