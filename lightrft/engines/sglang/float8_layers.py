"""Linear layers that SGLang keeps in 8 bits, able to take weights more than once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightrft.engines.base import EngineError


class InRows(NamedTuple):
    """What loads the weight of a layer in 8 bits.

    Attributes:
        loads: SGLang's parameter with its loader, over the memory of the weight: float8 ``[N, K]``.
        scale: of the rows, float32 ``[N]``, over the memory of the layer's scales.
    """

    loads: nn.Parameter
    scale: Tensor


def stay_loadable() -> None:
    """Before a model is made: have SGLang leave in each layer what it otherwise throws away as it quantises.

    What it then quantised is never computed with: every engine begins with a push.
    """
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

    quantise = Fp8LinearMethod.process_weights_after_loading

    def process_weights_after_loading(method: Any, layer: Any) -> None:
        loads = layer.weight
        quantise(method, layer)
        layer.in_rows = in_rows(loads, layer.weight, layer.weight_scale)

    Fp8LinearMethod.process_weights_after_loading = process_weights_after_loading


def in_rows(loads: nn.Parameter, weight: Tensor, scale: Tensor) -> InRows:
    """``loads`` turned to the memory of ``weight`` ``[K, N]``, whose columns have a ``scale`` each.

    Raises:
        EngineError: the GPU's kernels want it otherwise.
    """
    rows = weight.t()
    if not rows.is_contiguous() or scale.numel() != len(rows):
        raise EngineError(
            "SGLang's kernels for this GPU do not compute with 8-bit weights and a scale for each row; set "
            "quantization to null, or choose VLLMEngine."
        )
    loads.data = rows
    return InRows(loads, scale.detach().view(-1))


@contextmanager
def loadable(model: nn.Module) -> Iterator[dict[int, InRows]]:
    """The model as it was before SGLang quantised it; gives its layers in 8 bits by the storage of their weight."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "in_rows")]
    computed = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = layer.in_rows.loads
        yield {layer.weight.untyped_storage()._cdata: layer.in_rows for layer in layers}
    finally:
        for layer, weight in zip(layers, computed):
            layer.weight = weight
