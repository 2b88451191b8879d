"""A ``transformers`` model split over an engine's ranks by its own tensor-parallel plan (Megatron-LM, 1909.08053).

``transformers`` 5 brings the plan; what applies it changes between its versions, and makes the weights DTensors. Here
they stay plain tensors, which sleep and wake as ever, and layers talk by ``torch.distributed``: torch's own DTensor
styles took a third longer a token (24 layers on two gloo ranks).
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightrft.engines.base import EngineError
from lightrft.engines.group import EngineGroup
from lightrft.ops.shard import Shard


class _Split(nn.Module):
    """A module whose weights are cut over ``group``; put before the module's own class."""

    group: EngineGroup
    weight: Tensor
    bias: Tensor | None


class _Gathered(_Split):
    """Cut by its outputs, which every rank then gets whole."""

    def forward(self, values: Tensor) -> Tensor:
        return self.group.concatenate(super().forward(values))


class _Summed(_Split):
    """Cut by its inputs, of which every rank has its own: the outputs are sums."""

    def forward(self, values: Tensor) -> Tensor:
        total = self.group.sum(F.linear(values, self.weight))
        return total if self.bias is None else total + self.bias


class _SplitAndSummed(_Summed):
    """Cut by its inputs, of which every rank has all."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values.chunk(self.group.size, dim=-1)[self.group.rank])


class _Vocabulary(_Split):
    """An embedding cut by its rows: each is on one rank, and comes from there."""

    def forward(self, token_ids: Tensor) -> Tensor:
        length = len(self.weight)
        own = token_ids - self.group.rank * length
        elsewhere = (own < 0) | (own >= length)
        found = super().forward(own.masked_fill(elsewhere, 0))
        return self.group.sum(found.masked_fill(elsewhere[..., None], 0))


class _Style(NamedTuple):
    """Dimensions of weight and bias that are cut (``None``: every rank has all), and what the module becomes."""

    weight: int
    bias: int | None
    kind: type[_Split] | None


# By transformers' names, of which its versions have several for one style.
_GATHERED, _SPLIT_AND_SUMMED = _Style(0, 0, _Gathered), _Style(1, None, _SplitAndSummed)
_STYLES = {
    "colwise": _Style(0, 0, None),
    "colwise_gather_output": _GATHERED,
    "colwise_rep": _GATHERED,
    "rowwise": _Style(1, None, _Summed),
    "rowwise_split_input": _SPLIT_AND_SUMMED,
    "rowwise_rep": _SPLIT_AND_SUMMED,
    "embedding_rowwise": _Style(0, None, _Vocabulary),
}
_WHOLE = "replicated_with_grad_allreduce"  # on every rank


def place(model: PreTrainedModel, group: EngineGroup, device: torch.device) -> dict[Tensor, Shard]:
    """Give a model built :func:`without_parameters` its parameters, with meaningless values: of split ones this rank's.

    Args:
        model: its buffers are on ``device``.
        group: the ranks to split it over.
        device: where this rank computes.

    Returns:
        which part of its whole each split parameter is.

    Raises:
        EngineError: ``transformers`` has no plan for the model, or one that is not understood, or sizes that do not
            divide; with the numbers.
    """
    shards = _split(model, group) if group.size > 1 else {}
    placed: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if old not in placed:
                    shape = shards[old].shape if old in shards else old.shape
                    placed[old] = nn.Parameter(torch.empty(shape, dtype=old.dtype, device=device), requires_grad=False)
                module._parameters[name] = placed[old]
    return {placed[old]: shard for old, shard in shards.items()}


def _split(model: PreTrainedModel, group: EngineGroup) -> dict[Tensor, Shard]:
    """Make modules what their styles ask for; which part of each parameter this rank shall hold."""
    _check_sizes(model.config.get_text_config(), group.size)
    shards: dict[Tensor, Shard] = {}
    for name, style in _styles(model).items():
        module = model.get_submodule(name)
        for parameter, dim in (("weight", style.weight), ("bias", style.bias)):
            whole = getattr(module, parameter, None)
            if whole is not None and dim is not None:
                shards[whole] = _shard(f"{name}.{parameter}", whole, dim, group)
        if style.kind is not None:
            # A class of its own rather than a new forward: that would refer to the module, and keep a closed engine's
            # memory until the next garbage collection.
            module.__class__ = type(f"{style.kind.__name__}{type(module).__name__}", (style.kind, type(module)), {})
            module.group = group
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # it matters to gradients alone, and may lie beyond this rank's rows
    return shards


def _styles(model: PreTrainedModel) -> dict[str, _Style]:
    """By module, how the model's plan splits it.

    Raises:
        EngineError: there is no plan, or one with a style that is not known here.
    """
    plan: dict[str, str] = dict(model.tp_plan)
    architecture = type(model).__name__
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    styles: dict[str, _Style] = {}
    for name, part in chain(model.named_modules(), model.named_parameters()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if tied and (part is embedding or part is head):
            # A plan may split the head alone; both are one weight.
            style = "embedding_rowwise" if part is embedding else "colwise_gather_output"
        if style is None or style == _WHOLE:
            continue
        if style not in _STYLES or not isinstance(part, (nn.Linear, nn.Embedding)):
            raise EngineError(
                f"transformers splits {name} of {architecture} as {style!r}, which TransformersEngine cannot; set its "
                "tensor_parallel_size to 1."
            )
        styles[name] = _STYLES[style]
    if {model.get_submodule(name) for name in styles} <= {embedding, head}:
        raise EngineError(
            f"transformers has no plan to split {architecture} over ranks; set TransformersEngine's "
            "tensor_parallel_size to 1."
        )
    return styles


def _check_sizes(config: Any, ranks: int) -> None:
    names = ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size")
    sizes = {name: getattr(config, name, None) for name in names}
    uneven = [f"{name}={size}" for name, size in sizes.items() if isinstance(size, int) and size % ranks]
    if uneven:
        raise EngineError(
            f"tensor_parallel_size={ranks} does not divide the model's {', '.join(uneven)}; choose a divisor of all."
        )


def _shard(name: str, whole: Tensor, dim: int, group: EngineGroup) -> Shard:
    try:
        return Shard(tuple(whole.shape), dim, group.rank, group.size)
    except ValueError as error:
        raise EngineError(f"tensor_parallel_size={group.size} does not divide {name}: {error}") from error
