"""Drawing the next token of many requests at once, each with a seed and parameters of its own, on their device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightrft.engines.transformers.draw import inverse_cdf

# Logits at a time: some 8-byte copies of these are held, beside what an engine has allotted to itself.
_LOGITS = 1 << 24


@dataclass(frozen=True)
class Requests:
    """How the next token of each of ``B`` requests is drawn; as :class:`~lightrft.samples.Sampling` says.

    Attributes:
        temperature: float ``[B]``, above 0.
        top_k: int ``[B]``; as large as the vocabulary, or larger, keeps all.
        top_p: float ``[B]``.
        min_p: float ``[B]``.
        seed: int64 ``[B]``.
        position: int64 ``[B]``, which number of the seed's stream to take.
        truncated: whether any request has a ``top_k``, ``top_p`` or ``min_p`` that drops tokens.
        greedy: whether every request has a ``top_k`` of 1: it takes the likeliest token, the first among equals.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor
    truncated: bool
    greedy: bool = False


def hot(requests: Requests, now: Tensor, temperature: Tensor, top_k: Tensor) -> Requests:
    """Requests of which those where bool ``now`` ``[B]`` is set draw by FIRE's temperature and top-k instead.

    Where any is, ``requests`` must be truncated and not greedy.
    """
    return replace(
        requests,
        temperature=torch.where(now, temperature.to(requests.temperature), requests.temperature),
        top_k=torch.where(now, top_k.to(requests.top_k), requests.top_k),
        top_p=torch.where(now, 1.0, requests.top_p),
        min_p=torch.where(now, 0.0, requests.min_p),
    )


def draw(logits: Tensor, requests: Requests) -> tuple[Tensor, Tensor]:
    """Tokens, int64 ``[B]``, and their log-probs, float32 ``[B]`` nats, of the distributions they were drawn from.

    Args:
        logits: float ``[B, V]``; left as they are.
        requests: how.
    """
    likeliest, certain = logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    if requests.greedy:
        return likeliest, certain
    uniform = uniforms_at(requests.seed, requests.position)
    tokens, log_probs = [], []
    rows = max(1, _LOGITS // logits.shape[1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        distribution = _log_probs(logits[part].float(), requests, part)
        tokens.append(inverse_cdf(distribution, uniform[part]))
        log_probs.append(distribution.gather(1, tokens[-1][:, None]).squeeze(1))
    greedy = requests.top_k == 1
    return torch.where(greedy, likeliest, torch.cat(tokens)), torch.where(greedy, certain, torch.cat(log_probs))


def uniforms_at(seeds: Tensor, positions: Tensor) -> Tensor:
    """The numbers in [0, 1) at ``positions`` of the streams of ``seeds``, both int64 ``[B]``: float64 ``[B]``.

    Computed from the two alone (SplitMix64: Steele, Lea and Flood, 2014), so the same on every device and in any batch.
    """
    mixed = _mix(_mix(seeds) + positions * -7046029254386353131)  # 2^64 over the golden ratio
    return (mixed >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _mix(values: Tensor) -> Tensor:
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        values = (values ^ values >> shift & (1 << 64 - shift) - 1) * factor
    return values ^ values >> 31 & (1 << 33) - 1


def _log_probs(logits: Tensor, requests: Requests, part: slice) -> Tensor:
    """Temperature, then min-p, top-k and top-p in this order, as every engine does."""
    scaled = logits / requests.temperature[part, None]
    if not requests.truncated:
        return scaled.log_softmax(-1)
    probs = scaled.softmax(-1)
    drop = probs < requests.min_p[part, None] * probs.amax(-1, keepdim=True)
    # Sorted as they came: divided by a high temperature, logits that differ may round to the same number.
    values, order = logits.masked_fill(drop, -torch.inf).sort(-1, descending=True)
    last = requests.top_k[part, None].clamp(max=logits.shape[1]).long() - 1
    drop = values < values.gather(1, last)  # those as likely as the last one count too
    probs = (values.masked_fill(drop, -torch.inf) / requests.temperature[part, None]).softmax(-1)
    top_p = requests.top_p[part, None]
    drop |= (probs.cumsum(-1) - probs >= top_p) & (top_p < 1)
    kept = values.masked_fill(drop, -torch.inf) / requests.temperature[part, None]
    return torch.empty_like(kept).scatter_(1, order, kept).log_softmax(-1)
