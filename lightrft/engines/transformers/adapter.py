"""A low-rank adapter of an in-process engine's model: applied as it computes, beside weights that stay as pushed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightrft.engines.base import EngineError

_A, _B = ".lora_A.weight", ".lora_B.weight"


class _Adapted(nn.Linear):
    """A linear layer plus ``scaling * B @ A``; put in place of the layer's own class.

    Not merged: that would round the sum to the engine's dtype, and taking it off again would need the base twice.
    """

    down: Tensor
    up: Tensor
    scaling: float

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up) * self.scaling


class Adapter:
    """The adapter of ``model``, none at first (LoRA, Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        matrices: what was pushed, by name, in the dtype and on the device of the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.matrices: dict[str, Tensor] = {}

    def push(self, scaling: float, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take the place of the one before.

        Raises:
            EngineError: a layer that is not there or not linear, a matrix that is missing or does not fit; names it.
        """
        self.remove()
        modules = dict(self._model.named_modules())
        matrices, layers = {}, {}
        for name, tensor in tensors:
            layer = _layer(name)
            layers[layer] = _linear(layer, modules.get(layer))
            weight = layers[layer].weight
            matrices[name] = tensor.detach().to(weight.device, weight.dtype, copy=True)
        for name, linear in layers.items():
            _check(name, linear, matrices.get(name + _A), matrices.get(name + _B))
        self.matrices = matrices
        for name, linear in layers.items():
            linear.__class__ = _Adapted
            linear.down, linear.up, linear.scaling = matrices[name + _A], matrices[name + _B], scaling

    def remove(self) -> None:
        """The model computes with its weights alone."""
        for module in self._model.modules():
            if isinstance(module, _Adapted):
                del module.down, module.up, module.scaling
                module.__class__ = nn.Linear  # type: ignore[assignment]
        self.matrices = {}

    def move(self, device: torch.device) -> None:
        for matrix in self.matrices.values():
            matrix.data = matrix.data.to(device)


def _layer(name: str) -> str:
    return name.removesuffix(_A).removesuffix(_B)


def _linear(name: str, module: nn.Module | None) -> Any:
    if type(module) is not nn.Linear:
        raise EngineError(
            f"The engine has no linear layer {name!r} to adapt; push names as in the actor's own model, and where the "
            "adapter is not of linear layers alone, set WeightSync's lora to merged."
        )
    return module


def _check(name: str, linear: nn.Linear, down: Tensor | None, up: Tensor | None) -> None:
    if down is None or up is None:
        raise EngineError(f"Of the adapter of {name}, {'lora_A' if down is None else 'lora_B'} was not pushed.")
    outputs, inputs = linear.weight.shape
    if down.shape != (len(down), inputs) or up.shape != (outputs, len(down)):
        raise EngineError(
            f"The adapter of {name} was pushed with shapes {tuple(down.shape)} and {tuple(up.shape)}, but the layer "
            f"has {inputs} inputs and {outputs} outputs; start the engine from the actor's own config."
        )
