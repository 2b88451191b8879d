"""A packed row over the ranks of a group: each has its slice of it in the text decoder, and all of it elsewhere.

The row is cut at the decoder's input, so text and vision models go one way: what comes before the decoder (a vision
tower) runs whole on every rank, and its gradient there is what the rank's slice asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lightrft.ops import sum_of_parts

# Where an argument of a decoder has its tokens; position_ids are [1, N], or [3, 1, N] where a token has three.
_TOKEN_AXIS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1}
# A mask of image tokens, and what their first layers add to them (DeepStack, arXiv 2406.04334).
_DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")


class SequenceParallel:
    """Cuts what enters a decoder, and joins what is made of what leaves it.

    Args:
        group: the ranks that share a row, in its order.

    Attributes:
        rank: which of them this is.
        degree: how many they are.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.degree = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        """Itself: a process group cannot be copied, and nothing here changes."""
        return self

    def enter(self, decoder: nn.Module) -> RemovableHandle:
        """From now on ``decoder`` sees this rank's slice of every row, ``[1, N]`` cut to ``[1, ceil(N / degree)]``.

        It is called by keywords, with ``position_ids`` and ``cu_seq_lens_q`` of the whole row, and attends by
        :func:`lightrft.lightning_modules.packed_attention.packed_attention_forward`. Slices are of one length: the
        last token is repeated behind the row, as a segment of its own, which nothing sees and nothing reads.
        """
        return decoder.register_forward_pre_hook(self._cut, with_kwargs=True)

    def _cut(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict]:
        given = {name: value for name, value in kwargs.items() if value is not None}
        _check(decoder, args, given)
        positions, cu_seqlens = given["position_ids"], given["cu_seq_lens_q"]
        tokens = positions.shape[-1]
        share = self._share(tokens)
        own = torch.arange(self.rank * share, (self.rank + 1) * share, device=positions.device).clamp_max(tokens - 1)
        for name, axis in _TOKEN_AXIS.items():
            if name in given:
                given[name] = given[name].index_select(axis, own)
        if given.keys() >= set(_DEEPSTACK):
            mask, features = (given[name] for name in _DEEPSTACK)
            given |= _cut_deepstack(mask, features, own)
        if share * self.degree > tokens:
            given["cu_seq_lens_q"] = functional.pad(cu_seqlens, (0, 1), value=share * self.degree)
        return (), kwargs | given | {"sequence_group": self.group}

    def _share(self, tokens: int) -> int:
        return -(-tokens // self.degree)

    def at_predictions(
        self, hidden: Tensor, predict: Tensor, tokens: int, compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What ``compute`` makes of hidden states at ``predict``, each position on the rank that holds it. Collective.

        Args:
            hidden: this rank's slice out of the decoder, ``[ceil(N / degree), H]``.
            predict: int64 ``[M]``, positions in the whole row, the same on all ranks.
            tokens: ``N``.
            compute: maps ``[K, H]`` and int64 ``[K]`` positions in the whole row to tensors ``[K]``; ``K`` may be 0.

        Returns:
            each ``[M]``, whole on every rank; attached to this rank's graph even where ``K`` is 0, as all ranks must
            run the backward.
        """
        share = self._share(tokens)
        own = (predict // share == self.rank).nonzero()[:, 0]
        found = torch.stack(compute(hidden[predict[own] - self.rank * share], predict[own]))
        parts = found.new_zeros(len(found), len(predict)).index_copy(1, own, found)
        # No views of one tensor: fully_shard hangs its backward on what leaves a module.
        return tuple(whole.clone() for whole in sum_of_parts(parts, self.group))


def _check(decoder: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """Raise ``ValueError`` for what is not known to be cut rightly."""
    name = type(decoder).__name__
    if args or not {"position_ids", "cu_seq_lens_q"} <= given.keys():
        raise ValueError(f"{name} must be called by keywords, with position_ids and cu_seq_lens_q of the whole row.")
    known = {*_TOKEN_AXIS, *_DEEPSTACK, "cu_seq_lens_q"}
    others = [k for k, value in given.items() if k not in known and isinstance(value, (Tensor, list, tuple, dict))]
    if others:
        raise ValueError(
            f"{name} takes {', '.join(others)}, which sequence parallelism does not know how to cut; set "
            "sequence_parallel_size: 1."
        )


def _cut_deepstack(mask: Tensor, features: Sequence[Tensor], own: Tensor) -> dict[str, Any]:
    """Of features ``[V, H]`` at the tokens of ``mask`` ``[1, N]``, those at the tokens ``own``."""
    here = mask[:, own]
    rows = (mask.cumsum(-1) - 1)[:, own][here]
    return dict(zip(_DEEPSTACK, (here, [one.index_select(0, rows) for one in features])))
