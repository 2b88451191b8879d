"""Prompts and responses as a few one-dimensional tensors, to go between processes without pickling each of them.

Ragged things are joined, their lengths beside them; text is UTF-8 bytes. What comes back has tensors of its own, not
views, so that keeping one response does not keep all.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lightrft.samples import FinishReason, Media, Prompt, Response

Flat = dict[str, Tensor]
"""One-dimensional tensors on the host by name; names and dtypes do not depend on what they hold."""

_NUMPY: dict[torch.dtype, Any] = {torch.int64: np.int64, torch.float32: np.float32}
_FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


def flatten(responses: Sequence[Response]) -> Flat:
    """``N`` responses as an engine gives them, ``T`` tokens in all.

    Returns:
        ``token_ids`` int64 ``[T]``, ``log_probs`` float32 ``[T]`` nats, ``texts`` uint8; ``lengths`` (tokens),
        ``text_lengths`` (bytes), ``weight_versions``, ``seeds`` int64 ``[N]``; ``finish_reasons`` uint8 ``[N]``;
        ``segments`` int64, tokens and version of one after the other, ``segment_counts`` int64 ``[N]``.

    Raises:
        ValueError: a response that is scored or dropped already, which would be lost.
    """
    if any(response.reward is not None or response.reward_parts or response.dropped for response in responses):
        raise ValueError("A response to be flattened is scored already; flatten what an engine gives, before scoring.")
    segments = [segment for response in responses for segment in response.segments]
    texts = [response.text.encode("utf-8", "surrogatepass") for response in responses]
    return {
        "token_ids": _joined([response.token_ids for response in responses], torch.int64),
        "log_probs": _joined([response.log_probs for response in responses], torch.float32),
        "texts": _bytes(b"".join(texts)),
        "lengths": _integers(len(response.token_ids) for response in responses),
        "text_lengths": _integers(map(len, texts)),
        "weight_versions": _integers(response.weight_version for response in responses),
        "seeds": _integers(response.seed for response in responses),
        "finish_reasons": _integers(_FINISH_REASONS.index(response.finish_reason) for response in responses).byte(),
        "segments": _integers(number for segment in segments for number in segment),
        "segment_counts": _integers(len(response.segments) for response in responses),
    }


def unflatten(flat: Flat) -> list[Response]:
    """The responses that :func:`flatten` took, equal to the bit."""
    pairs = ((tokens, version) for tokens, version in flat["segments"].view(-1, 2).tolist())
    segments = [list(islice(pairs, count)) for count in flat["segment_counts"].tolist()]
    return [
        Response(token_ids, log_probs, text, _FINISH_REASONS[reason], version, seed, segments=own)
        for token_ids, log_probs, text, reason, version, seed, own in zip(
            _pieces(flat["token_ids"], flat["lengths"]),
            _pieces(flat["log_probs"], flat["lengths"]),
            _texts(flat["texts"], flat["text_lengths"]),
            flat["finish_reasons"].tolist(),
            flat["weight_versions"].tolist(),
            flat["seeds"].tolist(),
            segments,
        )
    ]


def flatten_requests(prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> Flat:
    """What an engine needs of ``P`` prompts with the seeds of each one's responses; ``seeds[i]`` are ``prompts[i]``'s.

    Returns:
        ``token_ids`` int64, ``uids`` uint8, ``seeds`` int64, joined; ``lengths`` (tokens), ``uid_lengths`` (bytes),
        ``counts`` (seeds) int64 ``[P]``; ``media`` uint8: pickled, empty where no prompt has any.
    """
    uids = [prompt.uid.encode("utf-8", "surrogatepass") for prompt in prompts]
    media = [prompt.media.state_dict() for prompt in prompts]
    return {
        "token_ids": _joined([prompt.token_ids for prompt in prompts], torch.int64),
        "uids": _bytes(b"".join(uids)),
        "seeds": _integers(seed for own in seeds for seed in own),
        "lengths": _integers(len(prompt.token_ids) for prompt in prompts),
        "uid_lengths": _integers(map(len, uids)),
        "counts": _integers(map(len, seeds)),
        "media": _bytes(pickle.dumps(media) if any(prompt.media for prompt in prompts) else b""),
    }


def unflatten_requests(flat: Flat) -> tuple[list[Prompt], list[list[int]]]:
    """Prompts without text, reference and record, which no engine reads, and the seeds of each one's responses."""
    media = pickle.loads(flat["media"].numpy().tobytes()) if len(flat["media"]) else [{}] * len(flat["lengths"])
    prompts = [
        Prompt(uid, token_ids, text="", media=Media.from_state_dict(own))
        for uid, token_ids, own in zip(
            _texts(flat["uids"], flat["uid_lengths"]), _pieces(flat["token_ids"], flat["lengths"]), media
        )
    ]
    seeds = iter(flat["seeds"].tolist())
    return prompts, [list(islice(seeds, count)) for count in flat["counts"].tolist()]


def from_list(numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``[N]`` of ``dtype``, int64 or float32, in a fraction of the time that ``torch.tensor`` takes for a list."""
    return torch.from_numpy(np.array(numbers, _NUMPY[dtype]))


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *parts])


def _pieces(joined: Tensor, lengths: Tensor) -> list[Tensor]:
    return [piece.clone() for piece in joined.split(lengths.tolist())]


def _integers(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)


def _texts(joined: Tensor, lengths: Tensor) -> list[str]:
    raw, ends = joined.numpy().tobytes(), lengths.cumsum(0).tolist()
    return [raw[end - size : end].decode("utf-8", "surrogatepass") for end, size in zip(ends, lengths.tolist())]
