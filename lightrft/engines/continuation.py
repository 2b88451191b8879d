"""Going on with a response that was interrupted: what it has becomes part of the prompt, and the parts are joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from lightrft.engines.stopping import Detokenizer, before_stop, stop_across
from lightrft.samples import Prompt, Response


def after(prompt: Prompt, begun: Response) -> Prompt:
    """What an engine is asked to go on from; media stay with the prompt's tokens."""
    return dataclasses.replace(prompt, token_ids=torch.cat([prompt.token_ids, begun.token_ids]))


def joined(begun: Response, more: Response, stops: Sequence[str], detokenizer: Detokenizer) -> Response:
    """A response and its next tokens as one, ended by a stop string that lies across them.

    Nothing that was known of a token changes. What is aborted is aborted whole.

    Args:
        begun: ended by ``length``.
        more: drawn after it.
        stops: stop strings that are no special tokens.
        detokenizer: decodes the joined parts.

    Returns:
        the response with the seed of ``begun``; :attr:`~lightrft.samples.Response.text` is to be :func:`spelled`, once
        nothing follows.
    """
    if more.finish_reason == "abort":
        return dataclasses.replace(more, seed=begun.seed)
    end = stop_across(begun.token_ids.tolist(), more.token_ids.tolist(), stops, detokenizer)
    return dataclasses.replace(
        more,
        token_ids=torch.cat([begun.token_ids, more.token_ids[:end]]),
        log_probs=torch.cat([begun.log_probs, more.log_probs[:end]]),
        text="",
        finish_reason="stop" if end is not None else more.finish_reason,
        seed=begun.seed,
        segments=_segments(begun, len(more.token_ids[:end]), more.weight_version),
    )


def spelled(response: Response, stops: Sequence[str], detokenizer: Detokenizer) -> str:
    """The text of its tokens, cut before a stop string."""
    return before_stop(detokenizer.decode(response.token_ids.tolist()), stops)


def _segments(begun: Response, tokens: int, version: int) -> list[tuple[int, int]]:
    segments = begun.segments or [(len(begun.token_ids), begun.weight_version)]
    if segments[-1][1] != version:
        return [*segments, (tokens, version)]
    merged = [*segments[:-1], (segments[-1][0] + tokens, version)]
    return merged if len(merged) > 1 else []
