"""Reading a prompt once for all of its samples."""

from __future__ import annotations

import inspect

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def can_share_prefill(model: PreTrainedModel) -> bool:
    """Whether the cache of ``model`` is plain attention states of text, whose rows may be repeated.

    Not so for recurrent states, nor for models that keep positions of images between calls.
    """
    config = model.config
    takes = inspect.signature(model.forward).parameters
    return (
        config.get_text_config() is config
        and {"position_ids", cache_argument(model), "logits_to_keep"} <= takes.keys()
        and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
        )
    )


def cache_argument(model: PreTrainedModel) -> str:
    """What ``model`` calls its cache: ``cache`` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def shared_prefill(model: PreTrainedModel, token_ids: Tensor, mask: Tensor, row_of: Tensor) -> DynamicCache:
    """Attention states of all but the last token of each prompt, repeated for its samples.

    The last token is left to ``generate``, which needs its logits.

    Args:
        model: one that :func:`can_share_prefill`.
        token_ids: int64 ``[P, L]``, left-padded prompts, ``L`` at least 2.
        mask: int64 ``[P, L]``, 0 on padding.
        row_of: int64 ``[B]``, the prompt of each sample.
    """
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)
    model(
        input_ids=token_ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(model): cache},
    )
    cache.batch_select_indices(row_of)
    return cache
