"""Log-probabilities and entropy of a language model's head without the whole ``[tokens, vocabulary]`` in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class _LogProbEntropy(torch.autograd.Function):
    """``log_softmax`` at the target, and entropy; keeps one copy of the logits where plain autograd keeps four."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_normalizer = logits.logsumexp(-1)
        log_probs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normalizer
        # A logit of -inf (a forbidden token) has probability 0 and must add 0, not 0 * inf.
        finite = logits.clamp_min(torch.finfo(logits.dtype).min)
        entropy = log_normalizer - (torch.exp(logits - log_normalizer[:, None]) * finite).sum(-1)
        ctx.save_for_backward(logits, targets, log_normalizer, entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_normalizer, entropy = ctx.saved_tensors
        # Far below where exp gives 0 nothing changes, and -inf must stay finite under any gradient that multiplies it.
        log_p = (logits - log_normalizer[:, None]).clamp_min(-1e4)
        probs = log_p.exp()
        # d log p_y / dz = 1_y - p;  dH / dz = -p (log p + H)
        grad = log_p.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad_log_probs[:, None]).mul_(probs)
        grad.scatter_add_(-1, targets[:, None], grad_log_probs[:, None])
        return grad, None


def log_probs_and_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    least_chunks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution, ``chunk_tokens`` rows of logits at a time.

    Logits of one chunk exist at a time, in the backward too, where each chunk is computed again (gradient
    checkpointing, Chen et al. 2016, arXiv 1604.06174). Exact: the chunks do not change value or gradient beyond the
    rounding of sums.

    Args:
        hidden: ``[M, H]``, what the head takes.
        targets: int64 ``[M]``.
        head: maps ``[C, H]`` to logits ``[C, V]``; may hold parameters.
        temperature: divides the logits.
        chunk_tokens: rows at a time.
        least_chunks: call the head as often, on no rows in the end: where each call is collective over ranks.

    Returns:
        ``(log_probs, entropy)``, each ``[M]`` in nats, at least float32.
    """

    def chunk(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _LogProbEntropy.apply(logits if temperature == 1 else logits / temperature, t)

    if len(targets) <= chunk_tokens and least_chunks <= 1:
        return chunk(hidden, targets)
    recompute = torch.is_grad_enabled()
    pieces = list(zip(hidden.split(chunk_tokens), targets.split(chunk_tokens)))
    pieces += [(hidden[:0], targets[:0])] * (least_chunks - len(pieces))
    parts = [
        checkpoint(chunk, h, t, use_reentrant=False, preserve_rng_state=False) if recompute else chunk(h, t)
        for h, t in pieces
    ]
    log_probs, entropy = zip(*parts)
    return torch.cat(log_probs), torch.cat(entropy)
