"""What a model takes beside the tokens: features of images and audio, and where their tokens lie."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lightrft.media import PER_TOKEN
from lightrft.ops import pad


def of_model(
    model: PreTrainedModel, media: dict[str, Tensor], lay_out: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Arguments of the model's forward.

    Args:
        model: the layers, without a head.
        media: of :class:`lightrft.ops.Packed`.
        lay_out: puts what is said of every token, ``[N]``, into the shape of ``input_ids``.

    Raises:
        ValueError: the model takes no features of that name; it would see nothing and say nothing.
    """
    takes = _takes(type(model).forward)
    found = {}
    for name, tensor in media.items():
        if not name.endswith(PER_TOKEN):
            if name not in takes:
                raise ValueError(f"{type(model).__name__} takes no {name}; the processor is another model's.")
            found[name] = tensor
        elif name in takes:
            found[name] = lay_out(tensor)
    return found


def positions(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, media: dict[str, Tensor]
) -> Tensor:
    """Of packed tokens, by the model's own method where it gives them several: ``[1, N]``, or ``[3, 1, N]``.

    Models with multimodal rotary embeddings (Qwen2-VL, arXiv 2409.12191) place a token of an image by time, height and
    width. Given plain numbers they would compute something else, and say nothing.

    Args:
        model: the layers, without a head.
        input_ids: int64 ``[N]``.
        position_ids: int64 ``[N]``, from 0 in each sequence.
        cu_seqlens: int32 ``[S + 1]``.
        media: of :class:`lightrft.ops.Packed`.
    """
    locate: Any = getattr(model, "get_rope_index", None)
    if locate is None or not media:
        return position_ids[None]
    ids, mask = pad(input_ids, cu_seqlens)
    known = {name: media[name] for name in _takes(type(model).get_rope_index) & media.keys()}
    known |= {name: pad(tensor, cu_seqlens)[0] for name, tensor in known.items() if name.endswith(PER_TOKEN)}
    found, _ = locate(input_ids=ids, attention_mask=mask.long(), **known)
    return found[:, mask][:, None]


@cache
def _takes(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
